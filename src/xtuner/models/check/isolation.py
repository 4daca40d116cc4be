"""Checks on a few random tokens that the samples of a row cannot see each other.

All passes are those of a training step: training mode, gradients, dropout, recomputation, autocast,
and the loaded weights.

1. **The neighbours change.** Two rows of the same lengths differ in every token of the first and
the last sample, and in the last token of the middle one. The other tokens of the middle sample must
keep their hidden states and the gradients of their embeddings, bit for bit, and a loss on them must
have a gradient of exactly zero at every other position. 2. A change may be due to rounding:
LLM.int8() chooses its outlier columns for all rows together, experts are multiplied in groups, or
drop tokens beyond their capacity. None of these has a gradient, and a small change of the
neighbours does not affect the choice, so the sample then keeps its bits. If it does not, the change
is compared with the effect of rounding on this model. 3. **The sample alone.** Errors that 1 cannot
detect (positions that do not restart, a shifted position, wrong `cu_seqlens`, another window size)
make the sample differ from transformers' own forward pass of it alone. If the two differ by more
than a few roundings, the rounding of this model is measured: the sample alone in rows of other
lengths, and with the output of every decoder layer changed by one rounding. 4. **The attention
function** is compared with the plain formula, with a window shorter than the samples: a probe of a
few tokens never reaches a real model's window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.device.heap import trim_if_grown
from xtuner.device.select import FLOAT16_OVERFLOWS
from xtuner.errors import ModelError
from xtuner.kernels.attention import packed
from xtuner.models.check.attention import ROUNDINGS, distance
from xtuner.models.check.training_pass import (
    decoder_of,
    layers_of,
    plain_attention,
    text_decoder,
    without_dropout,
)
from xtuner.types import Batch

LENGTHS = (5, 15, 12)
"""Tokens of the three samples of a probe; the middle one is observed. 32 in total, because training
pads rows to multiples of 16."""

EXTENSIONS = (1, 9, 17)
"""Tokens appended to the observed sample to measure how rounding depends on a row's length (16, 24
and 32 tokens)."""

NUDGES = (2.0**-5, 2.0**-7, 2.0**-9)
"""Relative changes of the neighbours' embeddings that may not affect a choice made for all rows;
those that exceed rounding are tried. The first is four roundings of bfloat16."""

FACTOR = 4
"""Tolerance as a multiple of the measured rounding. In eleven architectures with 2 and 24 layers,
in float32 and bfloat16, a sample in a row differed from itself alone by at most 1.5 times the
measured rounding."""

ROUNDING = 0.25
"""Root mean square of one rounding's relative error, in `torch.finfo.eps`: errors uniform over
``eps / 2`` have 0.29 for mantissas of 1 and 0.14 for mantissas of 2."""

BLIND = 0.5
"""From this tolerance on, rounding hides the errors that the check looks for."""


class NotFiniteError(ModelError):
    """Hidden states are non-finite, whatever the layout of a row."""


@dataclass(frozen=True)
class Observed:
    """The results of a pass for the middle sample without its last token.

    Attributes:
        states: Hidden states ``[n, H]``, float32.
        gradient: Gradient of a random projection of `states` at the embedding of each token of the
            row ``[N, H]``, float32.
        span: Start and (exclusive) end of the observed positions.
    """

    states: Tensor
    gradient: Tensor
    span: tuple[int, int]

    @property
    def own(self) -> Tensor:
        """The gradient at the observed positions."""
        return self.gradient[slice(*self.span)]

    def distance(self, other: Observed) -> float:
        """The larger of the relative differences of states and gradients."""
        return max(distance(self.states, other.states), distance(self.own, other.own))


class IsolationCheck:
    """The checks of one model.

    Args:
        lm: A `PackedCausalLM`.
        lengths: Lengths of the samples of a row; the second, or the only one, is observed.
    """

    def __init__(self, lm: Any, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.lm, self.lengths = lm, lengths
        middle = len(lengths) // 2
        start = sum(lengths[:middle])
        self.span = start, start + lengths[middle] - 1
        self.dtype: torch.dtype = lm.compute_dtype
        self._last: tuple[Observed, Observed] | None = None

    def _not_finite(self) -> str:
        if self.dtype == torch.float16:
            return f"the model's hidden states are not finite. {FLOAT16_OVERFLOWS}"
        return (
            "the model's outputs are not finite for ordinary tokens: its weights are damaged, or "
            "an earlier run diverged; use another checkpoint"
        )

    def leak(self) -> str | None:
        """How other tokens reach the observed sample; None if they do not.

        Raises:
            NotFiniteError: Hidden states are non-finite.
        """
        first, second = self._observe(self._ids()), self._observe(self._ids(changed=True))
        if not (first.states.isfinite().all() and first.gradient.isfinite().all()):
            raise NotFiniteError(self._not_finite())
        self._last = first, second
        if reached := self._reached(first) or self._reached(second):
            return reached
        changed = first.distance(second)
        if not changed:
            return None
        noise = FACTOR * first.distance(self._observe(self._ids()))
        if changed <= noise:
            return None
        seen = [size for size in NUDGES if size >= ROUNDINGS * torch.finfo(self.dtype).eps]
        nudged = (self._observe(self._ids(), nudge=size) for size in seen)
        if any(first.distance(other) <= noise for other in nudged):
            return None
        with self._comparable():
            allowed = FACTOR * self.rounding()
        if changed <= allowed:
            return None
        return f"its results change by {changed:.2g} with its neighbours in the row"

    def displaced(self) -> tuple[float, float]:
        """Difference between the observed sample in its row and transformers' own pass of it alone,
        and the allowed difference; call `leak` first."""
        assert self._last is not None
        first, second = self._last
        with self._comparable() as changed:
            states = self._states(self._ids()) if changed else first.states
            found = distance(states, self._alone())
            coupled = distance(first.states, second.states)
            allowed = max(ROUNDINGS * torch.finfo(self.dtype).eps, FACTOR * coupled)
            if found > allowed:
                allowed = max(allowed, FACTOR * self.rounding())
        return found, allowed

    def rounding(self) -> float:
        """How much rounding changes the observed sample's states, over different row layouts."""
        alone = self._alone()
        rows = [self._alone(more) for more in EXTENSIONS]
        with self._jittered():
            rows.append(self._alone())
        return max(distance(row, alone) for row in rows)

    def _reached(self, seen: Observed) -> str | None:
        """Which other tokens receive a gradient from the observed ones."""
        start, stop = self.span
        reached = seen.gradient.abs().amax(1) > 0
        kinds = {
            "it reads samples before it in the row": reached[:start],
            "it reads tokens that come later in its own text": reached[stop : stop + 1],
            "it reads samples after it in the row": reached[stop + 1 :],
        }
        return ", and ".join(text for text, some in kinds.items() if some.any()) or None

    def batch(self) -> Batch:
        """The row of the first pass."""
        return self._batch(self._ids())

    def _observe(self, ids: Tensor, *, nudge: float = 0.0) -> Observed:
        vectors: list[Tensor] = []
        start, stop = self.span

        def as_leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.detach()
            if nudge:
                output = output.clone()
                for part in (slice(0, start), slice(stop, None)):
                    signs = _signs(output[:, part])
                    output[:, part] += nudge * signs * output[:, part]
            vectors.append(output.requires_grad_())
            return vectors[-1].clone()  # some models scale it in place

        with self.lm.causal.get_input_embeddings().register_forward_hook(as_leaf):
            torch.manual_seed(0)  # dropout drops the same values in every pass
            hidden = self.lm.hidden_states(self._batch(ids))[0, start:stop]
        loss = (hidden.float() * _signs(hidden).float()).sum()
        (gradient,) = torch.autograd.grad(loss, vectors[:1], allow_unused=True)
        trim_if_grown()
        gradient = torch.zeros_like(vectors[0]) if gradient is None else gradient
        # XLNet's embeddings are [N, 1, H]
        return Observed(hidden.detach().float(), gradient.flatten(0, -2).float(), self.span)

    def _states(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.lm.hidden_states(self._batch(ids))[0, slice(*self.span)]
        return hidden.detach().float()

    def _alone(self, more: int = 0) -> Tensor:
        """States of the observed tokens in transformers' own pass, followed by `more` tokens."""
        start, stop = self.span
        ids = self._ids()[:, start:stop]
        ids = torch.cat([ids, self._words(more, first=500)], dim=1)
        output = decoder_of(self.lm.causal)(input_ids=ids, use_cache=False)
        trim_if_grown()
        states: Tensor = output.last_hidden_state[0, : stop - start].detach().float()
        return states

    def _ids(self, *, changed: bool = False) -> Tensor:
        start, stop = self.span
        ids = self._words(sum(self.lengths))
        if changed:
            others = self._words(sum(self.lengths), first=250)
            ids = torch.cat([others[:, :start], ids[:, start:stop], others[:, stop:]], dim=1)
        return ids

    def _words(self, count: int, *, first: int = 0) -> Tensor:
        """Tokens spread over the vocabulary, all different if it is large enough."""
        causal = self.lm.causal
        embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
        rows = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
        size = min(rows, getattr(head, "out_features", rows), 32000)
        step = next(n for n in (7919, 7907, 7901) if size % n)
        ids = (torch.arange(first, first + count) * step + 13) % size
        words: Tensor = ids[None].to(self.lm.device)
        return words

    def _batch(self, ids: Tensor) -> Batch:
        positions = torch.cat([torch.arange(n) for n in self.lengths])[None].to(ids.device)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return Batch(ids, ids, positions, cu_seqlens)

    @contextlib.contextmanager
    def _comparable(self) -> Iterator[bool]:
        """Make passes of other shapes comparable: disable dropout, and use transformers' attention
        for single samples. Yields whether there was dropout."""
        decoder = text_decoder(self.lm.causal)
        before = decoder.config._attn_implementation
        plain = plain_attention(decoder)
        takes_cu_seqlens = before == packed.NAME or "flash" in before
        alone = self._alone

        def by_transformers(more: int = 0) -> Tensor:
            decoder.set_attn_implementation(plain)
            try:
                return alone(more)
            finally:
                decoder.set_attn_implementation(before)

        with without_dropout(self.lm) as changed:
            if takes_cu_seqlens:
                self._alone = by_transformers  # type: ignore[method-assign]
            try:
                yield changed
            finally:
                self.__dict__.pop("_alone", None)

    @contextlib.contextmanager
    def _jittered(self) -> Iterator[None]:
        """Change the output of every decoder layer by one rounding, up or down."""
        step = ROUNDING * torch.finfo(self.dtype).eps

        def jitter(module: nn.Module, inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            moved = states + step * _signs(states) * states
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        with contextlib.ExitStack() as stack:
            for layer in layers_of(self.lm.causal):
                stack.enter_context(layer.register_forward_hook(jitter))
            yield


def _signs(like: Tensor) -> Tensor:
    """A fixed pattern of -1 and 1 in the shape of `like`."""
    count = torch.arange(like.numel(), dtype=torch.float32)
    signs = torch.sign(torch.sin(count * 12.9898 + 0.5))
    return signs.view(like.shape).to(like.device, like.dtype)
