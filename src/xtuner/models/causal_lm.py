"""A causal language model as the algorithms see it: packed rows in, summed losses out.

`PackedCausalLM` wraps a transformers (or PEFT) model. It calls the decoder without a cache and
without a mask, with the borders of the samples, and multiplies only supervised positions with the
output head. `verify` shows on a few random tokens, with the loaded weights, that samples in one row
cannot see each other and that hidden states times head are the model's logits: whatever
architecture is loaded, a wrong shortcut stops the run instead of training it silently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.device.select import FLOAT16_OVERFLOWS
from xtuner.errors import ModelError
from xtuner.kernels import attention
from xtuner.kernels.cross_entropy import ScoringHead, log_probabilities_of_logits
from xtuner.kernels.forward_override import with_forward
from xtuner.models.quantize import row_by_row
from xtuner.types import IGNORE_INDEX, Batch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float64: 1e-6}
"""Largest difference `verify` accepts, relative to the largest value, by number type."""

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration fields by which architectures change logits after the head; small logits hide a
soft cap."""


LONG_ROW = 512
"""Tokens from which on a row is filled up to a multiple of 64; shorter ones to one of 16."""


class PackedCausalLM(nn.Module):
    """Wraps `model` (a causal language model of transformers, or a PeftModel around one).

    Everything that trains enters through `__call__`, and each module inside through its own: hooks
    that gather sharded weights see every use of them.

    Args:
        model: the model; it stays reachable as `.model`.
        autocast: compute in this type although trained weights are float32; None computes in the
            weights' type.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.plain_logits = False
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
        """Where the model is."""
        return next(self.model.parameters()).device

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states ``[1, N, H]`` of a packed batch."""
        return self.causal.base_model(**self._inputs(batch)).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Tensor:
        """The log-probability of each supervised token of `batch`, float32 ``[S]``, in the order of
        the tokens (see `Batch.sequence_of_predicting`)."""
        positions = batch.predicting
        targets = batch.labels[0, 1:][positions]
        batch = _filled(batch)
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            head: Any = self.causal.get_output_embeddings()
            if not self.plain_logits and isinstance(head, ScoringHead):
                return head(self.hidden_states(batch)[0, positions], targets)  # type: ignore[operator, no-any-return]
            return log_probabilities_of_logits(self._logits(batch, positions), targets)

    def _logits(self, batch: Batch, positions: Tensor) -> Tensor:
        return self.causal(**self._inputs(batch), logits_to_keep=positions).logits[0]  # type: ignore[no-any-return]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        implementation = self.causal.config.get_text_config()._attn_implementation
        if implementation == attention.NAME or "flash" in implementation:
            borders = batch.cu_seqlens
            longest = int((borders[1:] - borders[:-1]).max())
            if implementation != attention.NAME:
                borders = borders.to(batch.input_ids.device)
            inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs

    @torch.no_grad()
    def verify(self) -> str | None:
        """Check isolation of packed samples and the shortcut from hidden states to logits.

        Returns:
            A note when the shortcut does not hold for this architecture and full logits are used
            instead.

        Raises:
            ModelError: samples in one row see each other.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                row_by_row(self.model),
                torch.autocast(
                    self.device.type, dtype=self.autocast, enabled=self.autocast is not None
                ),
            ):
                return self._verify()
        finally:
            self.model.train(was_training)

    def _verify(self) -> str | None:
        packed = self._probe((5, 7))
        parts = [self._probe((5,)), self._probe((7,), offset=5)]
        together = self.hidden_states(packed)
        self._refuse_overflow(together)
        apart = torch.cat([self.hidden_states(part) for part in parts], dim=1)
        if not _close(together, apart):
            raise ModelError(
                f"{type(self.causal).__name__} with attention "
                f"'{self.causal.config._attn_implementation}': a sample's "
                "result changes with its neighbours in the row, so packing would train on leaked "
                "text. Set "
                "attn_implementation = 'eager'; if that does not help, this architecture cannot "
                "be trained here."
            )
        head: Any = self.causal.get_output_embeddings()
        config = self.causal.config
        if not isinstance(head, ScoringHead):
            self.plain_logits = True
            return None
        assert isinstance(head, nn.Linear)
        changes = [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1.0)]
        everything = torch.arange(packed.num_tokens, device=self.device)
        if changes or not _close(head(together)[0], self._logits(packed, everything)):
            self.plain_logits = True
            return (
                f"{type(self.causal).__name__} changes its logits after the output head: "
                "the loss is computed from whole logits, which takes more memory"
            )
        return None

    def _refuse_overflow(self, hidden: Tensor) -> None:
        """Raise if numbers of the forward pass are too large for float16."""
        computed = self.autocast or hidden.dtype
        if computed == torch.float16 and not torch.isfinite(hidden).all():
            raise ModelError(
                f"{type(self.causal).__name__}: its hidden states are not finite. "
                f"{FLOAT16_OVERFLOWS}"
            )

    def _probe(self, lengths: tuple[int, ...], offset: int = 0) -> Batch:
        total = sum(lengths)
        vocabulary = self.causal.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(offset, offset + total) * 7919 + 13) % min(vocabulary, 32000)
        positions = torch.cat([torch.arange(n) for n in lengths])
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        batch = Batch(ids[None], ids[None].clone(), positions[None], borders)
        return batch.to(self.device)


def missing_to_round(count: int) -> int:
    """Tokens by which a row of `count` is filled up."""
    return -count % (64 if count >= LONG_ROW else 16)


def _filled(batch: Batch) -> Batch:
    """`batch` with one more sample, without loss, where N is not a round number.

    Every new N costs the matrix library compilations, and a crooked one some percent of each
    product; so packs that are nearly full are all of one size.
    """
    count = batch.num_tokens
    missing = missing_to_round(count)
    if not missing:
        return batch
    positions = F.pad(batch.position_ids, (0, missing))
    positions[0, count:] = torch.arange(missing, device=positions.device)
    pictures = batch.pictures and replace(
        batch.pictures,
        places=F.pad(batch.pictures.places, (0, missing)),
        counts=(*batch.pictures.counts, 0),
    )
    return Batch(
        input_ids=F.pad(batch.input_ids, (0, missing)),
        labels=F.pad(batch.labels, (0, missing), value=IGNORE_INDEX),
        position_ids=positions,
        cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=count + missing),
        pictures=pictures,
    )


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    low = torch.is_autocast_enabled(a.device.type)
    limit = max(TOLERANCE[a.dtype], TOLERANCE[torch.bfloat16] if low else 0)
    return bool((a - b).abs().max() <= limit * b.abs().max().clamp(min=1e-6))
