"""Verifies a loaded model: samples in one row stay apart, and the output head gives its logits.

`isolation` has the checks of packed rows. Here they become a note, an error, or a model that takes
one sample at a time. With any architecture, a wrong shortcut stops the run instead of silently
training a wrong model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xtuner.errors import ModelError, XTunerError, in_one_line
from xtuner.kernels.attention import packed as attention
from xtuner.kernels.cross_entropy import ScoringHead
from xtuner.models.can_pack import cannot_split
from xtuner.models.check.attention import ROUNDINGS, distance, wrong_attention
from xtuner.models.check.isolation import BLIND, FACTOR, LENGTHS, IsolationCheck, NotFiniteError
from xtuner.models.check.training_pass import text_decoder, traceless, without_dropout
from xtuner.parallel.ulysses import SequenceGroup

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration fields with which architectures change logits after the head; a soft cap has no
visible effect on small logits."""

SPLIT_ROUNDINGS = 64
"""Tolerance, in roundings, of log-probabilities when a row is split; matmuls of other shapes round
differently. In six architectures they changed by at most 3."""

_UNPACK_HINT = (
    "Set pack_to_max_length = False, or remove it: the model then takes one sample at a time"
)


def verify(lm: Any, *, packed: bool = True) -> str | None:
    """See `PackedCausalLM.verify`; `lm` is such a model."""
    notes: list[str | None] = []
    with traceless(lm), lm.autocasting():
        if not lm.apart and (fault := _fault_of_row(lm, notes)):
            if packed:
                raise ModelError(f"{_described(lm)}: {fault}. {_UNPACK_HINT}")
            lm.take_apart()
            notes = [f"the model takes one sample at a time: {fault}"]
        if lm.apart:
            _check_alone(lm)
        notes.append(_check_head(lm))
    return "; ".join(filter(None, notes)) or None


def split_rows(lm: Any, group: SequenceGroup) -> None:
    """See `PackedCausalLM.split_rows`; `lm` is such a model."""
    reason = cannot_split(text_decoder(lm.causal), group.size)
    if reason := reason or ("it takes one sample at a time" if lm.apart else None):
        raise ModelError(f"sequence_parallel_size = {group.size}: {reason}")
    batch = IsolationCheck(lm).batch()
    with traceless(lm), without_dropout(lm), lm.autocasting(), torch.no_grad():
        alone = lm(batch)
        lm.assume_split(group)
        found = lm(batch)
    off, eps = distance(found, alone), torch.finfo(lm.compute_dtype).eps
    if not off <= SPLIT_ROUNDINGS * eps:
        raise ModelError(
            f"sequence_parallel_size = {group.size}: {type(lm.causal).__name__} gives "
            f"different results when its rows are split (they differ by a relative "
            f"{off:.2g}): set it to 1"
        )


def _check_alone(lm: Any) -> None:
    check = IsolationCheck(lm, LENGTHS[1:2])
    try:
        leak = check.leak()
        learns = lm._scores_of_row(check.batch(), check.batch()).requires_grad
    except (XTunerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # third-party code
        raise ModelError(
            f"{_described(lm)}: a training step of one sample fails, so it cannot be "
            f"trained here: {in_one_line(error)}"
        ) from error
    if leak:
        raise ModelError(
            f"{_described(lm)}: {leak}. As configured it is not a causal language model "
            f"(but an encoder, for example), and cannot be trained here"
        )
    if not learns and any(parameter.requires_grad for parameter in lm.parameters()):
        raise ModelError(
            f"{_described(lm)}: no gradient reaches the trained weights, since its layers "
            "compute their own gradients; set tuning = 'full'"
        )


def _fault_of_row(lm: Any, notes: list[str | None]) -> str | None:
    """What goes wrong in a row of several samples; adds to `notes` what cannot be checked."""
    try:
        return _fault_of_checks(lm, notes)
    except (torch.OutOfMemoryError, NotFiniteError):
        raise
    except XTunerError as error:
        return str(error)
    except Exception as error:  # third-party code may not support a row of several samples
        return f"a row of several samples fails with {in_one_line(error)}"


def _fault_of_checks(lm: Any, notes: list[str | None]) -> str | None:
    check = IsolationCheck(lm)
    if leak := check.leak():
        return (
            "in a packed row a sample's result depends on its neighbours or on later tokens "
            f"({leak})"
        )
    if lm.attention_name == attention.NAME and (width := _head_width(lm.causal)):
        dtype = lm.compute_dtype
        wrong = wrong_attention(lm.attention_name, width=width, device=lm.device, dtype=dtype)
        if wrong:
            return wrong
    found, allowed = check.displaced()
    if found > allowed:
        return (
            f"a sample in a packed row differs from the same sample alone by a relative "
            f"{found:.2g}, but rounding explains only {allowed:.2g}: positions or boundaries "
            f"are wrong"
        )
    if allowed > BLIND:
        notes.append(
            f"rounding changes this model's results by {allowed / FACTOR:.0%} depending on "
            f"the row's length, so positions in packed rows could not be checked"
        )
    return None


def _check_head(lm: Any) -> str | None:
    """Compare hidden states times head with the model's logits, and use the shortcut only if
    they agree."""
    probe = IsolationCheck(lm, LENGTHS[1:2]).batch()
    head: Any = lm.causal.get_output_embeddings()
    config = lm.causal.config
    if not isinstance(head, ScoringHead):
        lm.plain_logits = True
        return None
    assert isinstance(head, nn.Linear)
    changes = [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1.0)]
    everything = torch.arange(probe.num_tokens, device=lm.device)
    with torch.no_grad(), without_dropout(lm):
        logits = lm.logits(lm.inputs_of(probe), everything)
        off = distance(head(lm.for_head(lm.hidden_states(probe)))[0], logits)
    if changes or off > ROUNDINGS * torch.finfo(lm.autocast or head.weight.dtype).eps:
        lm.plain_logits = True
        return (
            f"{type(lm.causal).__name__} changes its logits after the output head: "
            "the loss is computed from all logits, which takes more memory"
        )
    return None


def _described(lm: Any) -> str:
    """The model and its attention, for messages."""
    return f"{type(lm.causal).__name__} with attention {lm.attention_name!r}"


def _head_width(causal: Any) -> int | None:
    """Numbers in a head of the attention, as the configuration has them; None if it does not say,
    or if layers differ (Gemma 4)."""
    text = causal.config.get_text_config()
    try:
        heads = getattr(text, "num_attention_heads", None)
        width = getattr(text, "head_dim", None)
    except Exception:  # transformers refuses to name one value for layers that differ
        return None
    return width or (text.hidden_size // heads if isinstance(heads, int) else None)
