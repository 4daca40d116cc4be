"""A causal language model as the algorithms see it: packed rows in, summed losses out.

`PackedCausalLM` wraps a transformers (or PEFT) model. It calls the decoder without a cache or mask,
with the boundaries of the samples, and applies the output head to supervised positions only.
`verify` checks on a few random tokens, with the loaded weights, that samples in one row cannot see
each other and that hidden states times head equal the model's logits: with any architecture, a
wrong shortcut stops the run instead of silently training a wrong model.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.errors import ModelError, XTunerError
from xtuner.kernels.attention import packed as attention
from xtuner.kernels.cross_entropy import ScoringHead, log_probabilities_of_logits
from xtuner.kernels.fused.forward_override import with_forward
from xtuner.models.can_pack import cannot_split, why_apart
from xtuner.models.check.attention import ROUNDINGS, distance, wrong_attention
from xtuner.models.check.isolation import BLIND, FACTOR, LENGTHS, IsolationCheck, NotFiniteError
from xtuner.models.check.training_pass import (
    decoder_of,
    plain_attention,
    text_decoder,
    traceless,
    without_dropout,
)
from xtuner.models.filling import filled
from xtuner.models.graphs.capacity import Row
from xtuner.models.graphs.decoder import GraphedDecoder
from xtuner.models.neftune import EmbeddingNoise
from xtuner.models.split_rotary import SplitRotary
from xtuner.parallel.ulysses import SequenceGroup, gather_scores
from xtuner.types import Batch, ImageEmbedder

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration fields with which architectures change logits after the head; a soft cap has no
visible effect on small logits."""


SPLIT_ROUNDINGS = 64
"""Tolerance, in roundings, of log-probabilities when a row is split; matmuls of other shapes round
differently. In six architectures they changed by at most 3."""


class PackedCausalLM(nn.Module):
    """Wraps `model` (a transformers causal language model, or a PeftModel around one).

    Training always enters through `__call__`, and each inner module through its own, so that hooks
    that gather sharded weights see every use.

    Args:
        model: The model; available as `.model`.
        autocast: Compute in this dtype although trained weights are float32; None uses the weights'
            dtype.
        embedder: Embeds batches with images; None for a text-only model.

    Attributes:
        always_embeds: Batches without images also run the image modules, so that all processes call
            the same modules if weights or gradients are sharded.
        saw_images: a batch had images since this was last set to False.
        noise: NEFTune noise in training; None disables it.
        apart: Each sample goes through the model alone, in a plain transformers call.
        graphs: Replays the decoder in training if possible; None disables it.
        sequence: The processes that share the tokens of a row, after `split_rows`; None if this one
            has all tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        embedder: ImageEmbedder | None = None,
    ):
        super().__init__()
        self.model = model
        self.embedder = embedder
        self.sequence: SequenceGroup | None = None
        self._rotary: SplitRotary | None = None
        self.autocast = autocast
        self.always_embeds = self.saw_images = False
        self.graphs: GraphedDecoder | None = None
        self.plain_logits = False
        self.noise: EmbeddingNoise | None = None
        self.apart = why_apart(text_decoder(self.causal)) is not None
        head: Any = self.causal.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            head.__class__ = with_forward(ScoringHead, nn.Linear)

    @property
    def causal(self) -> Any:
        """The transformers model inside a PEFT wrapper, or the model itself."""
        inner = getattr(self.model, "get_base_model", None)
        return inner() if callable(inner) else self.model

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which most matmuls round: that of autocast, or the coarsest of the weights.
        `model.dtype` is that of the first floating-point parameter, possibly an adapter's: adapters
        are stored in float32 and multiplied in the dtype of the activations.
        """
        if self.autocast:
            return self.autocast
        found = {p.dtype for p in self.causal.parameters() if p.is_floating_point()}
        wide = {dtype for dtype in found if torch.finfo(dtype).bits >= 16}
        return max(wide, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states ``[1, N, H]`` of a packed batch."""
        return self._decoded(self._inputs(batch))

    def _decoded(self, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states of `inputs`, from a CUDA graph if there is one for such rows."""
        if self.graphs is not None and self._may_replay and "sequence_group" not in inputs:
            inputs = self._embedded(inputs)
            names = ("inputs_embeds", "position_ids", "cu_seq_lens_q", "max_length_q")
            found = self.graphs(Row(*(inputs[name] for name in names)))
            if found is not None:
                return found
        return decoder_of(self.causal)(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, batch: Batch | None, *, run: Callable[[], Any] | None = None) -> Any:
        """Return the log-probability of each supervised token of `batch`, float32 ``[S]``, in the
        order of the tokens (see `Batch.sequence_of_predicting`).

        Args:
            batch: The batch; None with `run`.
            run: Called instead, and its result is returned. All other uses of the model enter here,
                so that hooks that gather sharded weights see the pass from its start.
        """
        if run is not None:
            return run()
        assert batch is not None
        with self._autocast():
            if self.sequence is not None and self._rotary is not None:
                return self._scores_of_shares(batch, self.sequence, self._rotary)
            if not self.apart:
                tokens = longest = None
                if self.graphs is not None and self._may_replay:
                    tokens, longest = self.graphs.filling(batch.num_tokens)
                return self._scores_of_row(filled(batch, tokens=tokens, longest=longest), batch)
            if batch.num_sequences == 1:
                return self._scores_of_row(batch, batch)
            sequences = replace(batch, sequences_per_row=1).split()
            parts = [part for part in sequences if part.num_supervised] or sequences[:1]
            return torch.cat([self._scores_of_row(part, part) for part in parts])

    def _scores_of_row(self, row: Batch, batch: Batch) -> Tensor:
        """The log-probabilities of `batch`, the beginning of `row`."""
        positions = batch.predicting
        with self.noise.of_row(row.cu_seqlens) if self.noise else nullcontext():
            return self._scores(self._inputs(row), positions, batch.labels[0, 1:][positions])

    def _scores_of_shares(self, batch: Batch, group: SequenceGroup, rotary: SplitRotary) -> Tensor:
        """The log-probabilities of `batch`, whose row is split over `group`.

        A token's label is the next token, which may be on another process: labels are shifted
        before the split.
        """
        row = filled(batch, parts=group.size)
        share = group.share(row.num_tokens)
        positions = batch.predicting
        known = positions.tolist()
        first, last = (bisect.bisect_left(known, end) for end in (share.start, share.stop))
        own = positions[first:last]
        inputs = self._inputs(row)
        row_positions = inputs["position_ids"]
        for name in ("input_ids", "inputs_embeds"):
            if name in inputs:
                inputs[name] = inputs[name][:, share]
        inputs |= {"position_ids": row_positions[..., share], "sequence_group": group}
        noise = self.noise.of_row(row.cu_seqlens, share) if self.noise else nullcontext()
        with rotary.part_of(row_positions, share), noise:
            scores = self._scores(inputs, own - share.start, batch.labels[0, 1:][own])
        return gather_scores(scores, group, start=first, count=len(positions))

    def _scores(self, inputs: dict[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        """The log-probabilities of `targets` as next tokens of `positions`."""
        head: Any = self.causal.get_output_embeddings()
        if not self.plain_logits and isinstance(head, ScoringHead):
            hidden = self._decoded(inputs)[0, positions]
            return head(self._for_head(hidden), targets)  # type: ignore[operator, no-any-return]
        return log_probabilities_of_logits(self._logits(inputs, positions), targets)

    def _logits(self, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        if "logits_to_keep" in inspect.signature(self.causal.forward).parameters:
            return self.causal(**inputs, logits_to_keep=positions).logits[0]  # type: ignore[no-any-return]
        return self.causal(**inputs).logits[0, positions]  # type: ignore[no-any-return]

    def _for_head(self, hidden: Tensor) -> Tensor:
        """`hidden` in the head's dtype: Mamba keeps residuals in float32 and casts them at this
        point."""
        weight: Tensor = self.causal.get_output_embeddings().weight
        return hidden if self.autocast else hidden.to(weight.dtype)

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled)

    @property
    def _implementation(self) -> str:
        """The name of the attention function in transformers' attention interface."""
        return str(self.causal.config.get_text_config()._attn_implementation)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        positions = batch.position_ids
        if self.embedder is not None and (batch.images is not None or self.always_embeds):
            self.saw_images |= batch.images is not None and torch.is_grad_enabled()
            ids = inputs.pop("input_ids")
            inputs["inputs_embeds"] = self.embedder.embed(ids, batch.images)
            positions = self.embedder.positions(batch)
        if self.apart:
            return inputs
        inputs["position_ids"] = positions
        implementation = self._implementation
        if implementation == attention.NAME or "flash" in implementation:
            cu_seqlens = batch.cu_seqlens
            longest = max(stop - start for start, stop in itertools.pairwise(cu_seqlens.tolist()))
            if implementation != attention.NAME:
                cu_seqlens = cu_seqlens.to(batch.input_ids.device)
            inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs

    def _embedded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with embeddings in place of token ids."""
        if "input_ids" not in inputs:
            return inputs
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return {**rest, "inputs_embeds": self.causal.get_input_embeddings()(inputs["input_ids"])}

    def reads_embeddings_alone(self) -> bool:
        """Whether embeddings instead of token ids give bitwise equal hidden states; models with
        embeddings in every layer need the ids."""
        inputs = self._inputs(IsolationCheck(self).batch())
        decoder = decoder_of(self.causal)
        with torch.no_grad(), self._autocast(), without_dropout(self):
            wanted = decoder(**inputs).last_hidden_state
            try:
                found = decoder(**self._embedded(inputs)).last_hidden_state
            except (ValueError, TypeError, NotImplementedError):
                return False
            return torch.equal(found, wanted)

    @property
    def _may_replay(self) -> bool:
        """Whether this is a training pass of a packed row."""
        return self.training and torch.is_grad_enabled() and not self.apart

    def decoder(
        self, embeddings: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        """The decoder without its input embedding; see `graphs.graph.Body`."""
        found = decoder_of(self.causal)(
            inputs_embeds=embeddings,
            position_ids=positions,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        return found.last_hidden_state  # type: ignore[no-any-return]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of `decoder` and of the rest of the base model, except the input
        embedding."""
        outside = {id(p) for p in self.causal.get_input_embeddings().parameters()}
        everything = decoder_of(self.causal).parameters()
        return [p for p in everything if p.requires_grad and id(p) not in outside]

    def verify(self, *, packed: bool = True) -> str | None:
        """Check on a few random tokens, with training passes, that no token reads another sample or
        a later token, and that the shortcut from hidden states to logits is right; see `isolation`.

        Args:
            packed: The user requires samples to share rows. Otherwise a model that cannot separate
                them takes one sample at a time from now on, even those of one row.

        Returns:
            Notes for the user about this architecture.

        Raises:
            ModelError: Samples in one row see each other or are computed wrongly; or a single
                sample reads later tokens or cannot be computed.
        """
        notes: list[str | None] = []
        with traceless(self), self._autocast():
            if not self.apart and (fault := self._fault_of_row(notes)):
                if packed:
                    raise ModelError(f"{self._described()}: {fault}. {_PACK_NOT}")
                self.take_apart()
                notes = [f"the model takes one sample at a time: {fault}"]
            if self.apart:
                self._check_alone()
            notes.append(self._check_head())
        return "; ".join(filter(None, notes)) or None

    def take_apart(self) -> None:
        """Pass each sample through the model alone, with transformers' own attention."""
        self.apart = True
        if self._implementation == attention.NAME:
            decoder = text_decoder(self.causal)
            decoder.set_attn_implementation(plain_attention(decoder))

    def _check_alone(self) -> None:
        check = IsolationCheck(self, LENGTHS[1:2])
        try:
            leak = check.leak()
            learns = self._scores_of_row(check.batch(), check.batch()).requires_grad
        except (XTunerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # third-party code
            raise ModelError(
                f"{self._described()}: a training step of one sample fails, so it cannot be "
                f"trained here: {_told(error)}"
            ) from error
        if leak:
            raise ModelError(
                f"{self._described()}: {leak}. As configured it is not a causal language model "
                f"(but an encoder, for example), and cannot be trained here"
            )
        if not learns and any(parameter.requires_grad for parameter in self.parameters()):
            raise ModelError(
                f"{self._described()}: no gradient reaches the trained weights, since its layers "
                "compute their own gradients; set tuning = 'full'"
            )

    def split_rows(self, group: SequenceGroup) -> None:
        """From now on, split each row over the processes of `group`, which call the model together
        with the same batch. Each gets the log-probabilities of all tokens; weight gradients are
        those of its own part and must be summed over the group.

        Raises:
            ModelError: The model's rows cannot be split, or give other results.
        """
        reason = cannot_split(text_decoder(self.causal), group.size)
        if reason := reason or ("it takes one sample at a time" if self.apart else None):
            raise ModelError(f"sequence_parallel_size = {group.size}: {reason}")
        batch = IsolationCheck(self).batch()
        with traceless(self), without_dropout(self), self._autocast(), torch.no_grad():
            alone = self(batch)
            self.assume_split(group)
            found = self(batch)
        off, eps = distance(found, alone), torch.finfo(self.compute_dtype).eps
        if not off <= SPLIT_ROUNDINGS * eps:
            raise ModelError(
                f"sequence_parallel_size = {group.size}: {type(self.causal).__name__} gives "
                f"different results when its rows are split (they differ by a relative "
                f"{off:.2g}): set it to 1"
            )

    def assume_split(self, group: SequenceGroup) -> None:
        """`split_rows` without a check."""
        self._rotary, self.sequence = SplitRotary(self.causal), group

    def _described(self) -> str:
        """The model and its attention, for messages."""
        return f"{type(self.causal).__name__} with attention {self._implementation!r}"

    def _fault_of_row(self, notes: list[str | None]) -> str | None:
        """What goes wrong in a row of several samples; what cannot be checked is added to
        `notes`."""
        try:
            return self._fault_of_checks(notes)
        except torch.OutOfMemoryError:
            raise
        except NotFiniteError:
            raise
        except XTunerError as error:
            return str(error)
        except Exception as error:  # third-party code may not support a row of several samples
            return f"a row of several samples fails with {_told(error)}"

    def _fault_of_checks(self, notes: list[str | None]) -> str | None:
        check = IsolationCheck(self)
        if leak := check.leak():
            return (
                "in a packed row a sample's result depends on its neighbours or on later tokens "
                f"({leak})"
            )
        if self._implementation == attention.NAME and (width := _head_width(self.causal)):
            dtype = self.compute_dtype
            wrong = wrong_attention(
                self._implementation, width=width, device=self.device, dtype=dtype
            )
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

    def _check_head(self) -> str | None:
        """Compare hidden states times head with the model's logits, and use the shortcut only if
        they agree."""
        probe = IsolationCheck(self, LENGTHS[1:2]).batch()
        head: Any = self.causal.get_output_embeddings()
        config = self.causal.config
        if not isinstance(head, ScoringHead):
            self.plain_logits = True
            return None
        assert isinstance(head, nn.Linear)
        changes = [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1.0)]
        everything = torch.arange(probe.num_tokens, device=self.device)
        with torch.no_grad(), without_dropout(self):
            logits = self._logits(self._inputs(probe), everything)
            off = distance(head(self._for_head(self.hidden_states(probe)))[0], logits)
        if changes or off > ROUNDINGS * torch.finfo(self.autocast or head.weight.dtype).eps:
            self.plain_logits = True
            return (
                f"{type(self.causal).__name__} changes its logits after the output head: "
                "the loss is computed from all logits, which takes more memory"
            )
        return None


_PACK_NOT = (
    "Set pack_to_max_length = False, or remove it: the model then takes one sample at a time"
)


def _told(error: Exception) -> str:
    """A library's complete error message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
