"""A batch of answers that grow token by token; answers join and leave between two tokens.

    admit ──prompts, padded on the left──► model ──► keys and values join the cache ──► first tokens
    step  ──one id per row───────────────► model ──────────────────────────────────► next tokens

Padding is masked, and a row counts its positions from its own first token. Keys and values of all
layers are kept for the complete rows, also where a layer looks at a window only: its mask says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.device.heap import trim_if_grown
from xtuner.generation.answer import Answer
from xtuner.kernels.attention import packed

Within = Callable[[Callable[[], Any]], Any]
"""Calls a function that runs the model, and returns its result."""

NEEDED = ("attention_mask", "position_ids", "past_key_values", "use_cache")
"""Arguments of a model that takes left-padded batches."""


def takes_batches(model: Any) -> bool:
    """Whether `model` can answer several prompts of different lengths at once."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", False):  # recurrent states cannot mask padding
        return False
    parameters = inspect.signature(base.forward).parameters
    if not all(name in parameters for name in NEEDED):
        return False
    layers = DynamicCache(config=base.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def takes(model: Any, argument: str) -> bool:
    """Whether the forward pass of `model` has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def plainly(run: Callable[[], Any]) -> Any:
    """Return `run()`, for a model whose weights are not sharded."""
    return run()


class RunningBatch:
    """Answers of one model in generation mode (`generate.generation_mode`).

    Attributes:
        rows: The answers that have not ended.
    """

    def __init__(self, model: Any) -> None:
        self.rows: list[Answer] = []
        self._model = model
        self._extra = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self._cache: Any = None
        self._mask: Tensor = torch.empty(0)  # [B, T]

    def admit(self, rows: Sequence[Answer]) -> list[tuple[Answer, str]]:
        """Read the prompts of `rows`, generate their first tokens, and add them.

        Returns:
            each row with the text to show.
        """
        prompts = [rows] if not any(row.inputs for row in rows) else [[row] for row in rows]
        return [pair for group in prompts for pair in self._admit(group)]

    @torch.no_grad()
    def _admit(self, rows: Sequence[Answer]) -> list[tuple[Answer, str]]:
        from transformers.cache_utils import DynamicCache

        device = self._device
        longest = max(len(row.ids) for row in rows)
        mask = torch.tensor(
            [[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device
        )
        inputs: dict[str, Any] = dict(rows[0].inputs)
        if not inputs:
            padded = [[0] * (longest - len(row.ids)) + row.ids for row in rows]
            inputs["input_ids"] = torch.tensor(padded, device=device)
        inputs.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        cache = DynamicCache()
        logits = self._forward(mask, cache, **inputs)
        self._join(cache, mask, rows)
        return self._take(list(rows), logits)

    @torch.no_grad()
    def step(self) -> list[tuple[Answer, str]]:
        """Generate one token of each row; returns each row with the text to show."""
        rows, device = list(self.rows), self._device
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[len(row.ids) - 1] for row in rows], device=device)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self._mask, self._cache, input_ids=ids, position_ids=positions)
        return self._take(rows, logits)

    def remove(self, rows: Sequence[Answer]) -> None:
        """Remove `rows`, and the padding that no other row needs."""
        leaving = {id(row) for row in rows}
        keep = [i for i, row in enumerate(self.rows) if id(row) not in leaving]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        if not keep:
            self._cache = None
            return
        index = torch.tensor(keep, device=self._device)
        self._mask = self._mask[index]
        unused = int((self._mask.sum(0) == 0).int().cumprod(0).sum())
        self._mask = self._mask[:, unused:]
        for layer in self._layers(self._cache):
            layer.keys = layer.keys[index, :, unused:]
            layer.values = layer.values[index, :, unused:]

    @property
    def _device(self) -> torch.device:
        return torch.device(next(self._model.parameters()).device)

    def _forward(self, mask: Tensor, cache: Any, **inputs: Any) -> Tensor:
        """The logits of the last position ``[B, V]``, float32."""
        with packed.without_cudnn(self._device):
            output = self._model(
                attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self._extra
            )
        trim_if_grown()
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _take(self, rows: Sequence[Answer], logits: Tensor) -> list[tuple[Answer, str]]:
        taken = [(row, row.take(one[None])) for row, one in zip(rows, logits, strict=True)]
        self.remove([row for row in rows if row.finish])
        return taken

    def _join(self, cache: Any, mask: Tensor, rows: Sequence[Answer]) -> None:
        """Append the cache of new rows to that of the others, both padded to one length."""
        self.rows += rows
        if self._cache is None:
            self._cache, self._mask = cache, mask
            return
        length = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([_padded(self._mask, length, 1), _padded(mask, length, 1)])
        layers = zip(self._layers(self._cache), self._layers(cache), strict=True)
        for old, new in layers:
            for name in ("keys", "values"):
                both = (getattr(layer, name) for layer in (old, new))
                setattr(old, name, torch.cat([_padded(t, length, 2) for t in both]))

    def _layers(self, cache: Any) -> Iterator[Any]:
        """The layers with a cache: some models share keys and values between layers."""
        return (layer for layer in cache.layers if layer.is_initialized)


class OneByOne:
    """Like `RunningBatch`, for a model that takes no batches: one answer after the other.

    Args:
        model: A model in generation mode.
        within: Calls what runs the model, inside of whatever gathers sharded weights.

    Attributes:
        rows: The answers that have not ended; the first one is being generated.
    """

    def __init__(self, model: Any, within: Within = plainly) -> None:
        self.rows: list[Answer] = []
        self._model, self._within = model, within
        self._extra = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        # State-space models have another kind of cache.
        self._cached = takes(model, "past_key_values")
        self._cache: Any = None
        self._positions: Tensor | None = None

    def admit(self, rows: Sequence[Answer]) -> list[tuple[Answer, str]]:
        """Queue `rows`."""
        self.rows += rows
        return []

    @torch.no_grad()
    def step(self) -> list[tuple[Answer, str]]:
        """Generate one token of the first row."""
        row = self.rows[0]
        inputs = self._inputs(row) | self._extra
        if self._cached:
            inputs["past_key_values"] = self._cache
        with packed.without_cudnn(next(self._model.parameters()).device):
            output = self._within(functools.partial(self._model, **inputs, use_cache=self._cached))
        trim_if_grown()
        self._cache = output.past_key_values if self._cached else None
        piece = row.take(output.logits[:, -1].float())
        if row.finish:
            self.remove([row])
        return [(row, piece)]

    def _inputs(self, row: Answer) -> dict[str, Any]:
        """The inputs that the cache does not have."""
        if not row.num_generated:
            self._cache, self._positions = None, row.inputs.get("position_ids")
            if row.inputs:
                return dict(row.inputs)
        ids = row.ids if self._cache is None else row.ids[-1:]
        device = next(self._model.parameters()).device  # the embedding may be on another device
        inputs = {"input_ids": torch.tensor([ids], device=device)}
        if self._positions is not None:
            self._positions = self._positions[..., -1:] + 1
            inputs["position_ids"] = self._positions
        return inputs

    def remove(self, rows: Sequence[Answer]) -> None:
        """Remove `rows`."""
        self.rows = [row for row in self.rows if row not in rows]
        if not self.rows:
            self._cache = None


def _padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` with zeros before it along `dim`, up to `length`."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 1 - dim), missing, 0))
