"""A causal language model as the algorithms see it: packed rows in, log-probabilities out.

`PackedCausalLM` wraps a transformers (or PEFT) model. It calls the decoder without a cache or mask,
with the boundaries of the samples, and applies the output head to supervised positions only.
`verify` checks these shortcuts with the loaded weights.
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

from xtuner.kernels.attention import packed as attention
from xtuner.kernels.cross_entropy import ScoringHead, log_probabilities_of_logits
from xtuner.kernels.fused.forward_override import with_forward
from xtuner.models.can_pack import why_apart
from xtuner.models.check import verification
from xtuner.models.check.isolation import IsolationCheck
from xtuner.models.check.training_pass import (
    decoder_of,
    plain_attention,
    text_decoder,
    without_dropout,
)
from xtuner.models.filling import filled
from xtuner.models.graphs.capacity import Row
from xtuner.models.graphs.decoder import GraphedDecoder
from xtuner.models.neftune import EmbeddingNoise
from xtuner.models.split_rotary import SplitRotary
from xtuner.parallel.ulysses import SequenceGroup, gather_scores
from xtuner.types import Batch, ImageEmbedder


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
        saw_images: A batch had images since this was last set to False.
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
        return self._decoded(self.inputs_of(batch))

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
        with self.autocasting():
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
            return self._scores(self.inputs_of(row), positions, batch.labels[0, 1:][positions])

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
        inputs = self.inputs_of(row)
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
            return head(self.for_head(hidden), targets)  # type: ignore[operator, no-any-return]
        return log_probabilities_of_logits(self.logits(inputs, positions), targets)

    def logits(self, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        """The model's own logits ``[S, V]`` at `positions` of a row."""
        if "logits_to_keep" in inspect.signature(self.causal.forward).parameters:
            return self.causal(**inputs, logits_to_keep=positions).logits[0]  # type: ignore[no-any-return]
        return self.causal(**inputs).logits[0, positions]  # type: ignore[no-any-return]

    def for_head(self, hidden: Tensor) -> Tensor:
        """`hidden` in the head's dtype: Mamba keeps residuals in float32 and casts them at this
        point."""
        weight: Tensor = self.causal.get_output_embeddings().weight
        return hidden if self.autocast else hidden.to(weight.dtype)

    def autocasting(self) -> torch.autocast:
        """The autocast context of a forward pass."""
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled)

    @property
    def attention_name(self) -> str:
        """The name of the attention function in transformers' attention interface."""
        return str(self.causal.config.get_text_config()._attn_implementation)

    def inputs_of(self, batch: Batch) -> dict[str, Any]:
        """The arguments of transformers' forward pass for `batch`."""
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
        implementation = self.attention_name
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
        inputs = self.inputs_of(IsolationCheck(self).batch())
        decoder = decoder_of(self.causal)
        with torch.no_grad(), self.autocasting(), without_dropout(self):
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
        a later token, and that the shortcut from hidden states to logits is right.

        Args:
            packed: The user requires samples to share rows. Otherwise a model that cannot separate
                them takes one sample at a time from now on, even those of one row.

        Returns:
            Notes for the user about this architecture.

        Raises:
            ModelError: Samples in one row see each other or are computed wrongly; or a single
                sample reads later tokens or cannot be computed.
        """
        return verification.verify(self, packed=packed)

    def take_apart(self) -> None:
        """Pass each sample through the model alone, with transformers' own attention."""
        self.apart = True
        if self.attention_name == attention.NAME:
            decoder = text_decoder(self.causal)
            decoder.set_attn_implementation(plain_attention(decoder))

    def split_rows(self, group: SequenceGroup) -> None:
        """From now on, split each row over the processes of `group`, which call the model together
        with the same batch. Each gets the log-probabilities of all tokens; weight gradients are
        those of its own part and must be summed over the group.

        Raises:
            ModelError: The model's rows cannot be split, or give other results.
        """
        verification.split_rows(self, group)

    def assume_split(self, group: SequenceGroup) -> None:
        """`split_rows` without a check."""
        self._rotary, self.sequence = SplitRotary(self.causal), group
