"""The data types passed between the parts of xtuner, and the protocol of an algorithm.

    row (dict) ──format──► Conversation | Text ──template──► Encoded ──pack──► Sample list
    ──collate──► Batch ──loss──► LossOutput

This module does not import torch at run time, so that ``xtuner list-cfg`` starts fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that the loss ignores (the default of torch's `cross_entropy`)."""

IMAGE = "<image>"
"""Placeholder of an image in the text of a message; one token, expanded to one per patch."""

Role = Literal["system", "user", "assistant", "tool"]
Row = Mapping[str, Any]
"""One row of a data file, as read."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `loss` overrides whether the turn is supervised: None is the default (only assistant turns are),
    False excludes an assistant turn. `weight` is the loss weight of each of its tokens. `images`
    names the images of the turn, one for each ``<image>`` in `content`, in order. `reasoning` is
    what the assistant thinks before `content`. With `mask_thought` the reasoning, and the content
    of a turn with calls, are not supervised.
    """

    role: Role
    content: str
    loss: bool | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    images: tuple[str, ...] = ()
    reasoning: str = ""
    mask_thought: bool = False
    weight: float = 1.0

    @property
    def supervised(self) -> bool:
        """Whether the tokens of this turn contribute to the loss."""
        return self.role == "assistant" and self.loss is not False and self.weight > 0

    def as_dict(self) -> dict[str, Any]:
        """The turn as a dict for `tokenizer.apply_chat_template`."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        return turn


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the JSON schemas of the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The images of all messages, in order."""
        return tuple(name for message in self.messages for name in message.images)


@dataclass(frozen=True)
class Text:
    """Plain text for continued pretraining; every token except the first is supervised."""

    text: str


@dataclass(frozen=True)
class Preference:
    """A preferred and a rejected conversation, usually the same prompt with two answers."""

    chosen: Conversation
    rejected: Conversation


Record = Conversation | Text | Preference
"""What a dataset format converts a row to."""


class Encoded(NamedTuple):
    """Token ids, an aligned mask of the tokens that the loss is computed on, and their aligned loss
    weights, positive where the mask is true; None if all are 1."""

    input_ids: list[int]
    loss_mask: list[bool]
    weights: list[float] | None = None


class RecordEncoder(Protocol):
    """Encodes the parts of a record with the template and tokenizer of the run."""

    def conversation(self, record: Conversation) -> Encoded:
        """Encode a conversation to one sequence; assistant turns are supervised, as far as one
        sequence can show them as in a chat."""
        ...

    def sequences(self, record: Conversation) -> Sequence[Encoded]:
        """Encode a conversation to the sequences that together supervise each assistant turn once;
        several if the chat template rewrites earlier turns."""
        ...

    def text(self, record: Text) -> Encoded:
        """Encode text with the tokenizer's BOS and EOS; all but the first token are supervised."""
        ...


@dataclass(frozen=True)
class RowRef:
    """The origin of a row: `source` is a path or hub name, `line` counts from 1, and `unit` is what
    it counts, 'line' or 'row'."""

    source: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.line}"


class ImageRef(NamedTuple):
    """An image of a row: its name in the data, and how many tokens stand for it."""

    name: str
    num_tokens: int


@dataclass(frozen=True)
class Sample:
    """One encoded row: `input_ids` int64 ``[T]``, `loss_mask` bool ``[T]``, where it came from,
    the images whose tokens are among these, the lengths of its sequences where it has several, and
    the loss weights of its tokens, float32 ``[T]``, or None if all are 1."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: RowRef
    images: tuple[ImageRef, ...] = ()
    lengths: tuple[int, ...] = ()
    weights: np.ndarray | None = None

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; most algorithms have one sequence per row."""
        return self.lengths or (len(self.input_ids),)


@dataclass(frozen=True)
class BatchImages:
    """The P images of a batch, in the order of their tokens.

    Attributes:
        pixel_values: float32 ``[3, H, W]`` of each image that has to go through the vision tower.
        mask: bool ``[1, N]``, true at the tokens of images.
        sizes: Width and height in pixels of each of the P images as decoded.
        counts: Number of images of each sample.
        features: For each of the P images, its cached output of the vision tower ``[T, H]``, or
            None if it is the next of `pixel_values`.
        keys: A hash of each image's content if features are cached; otherwise empty.
    """

    pixel_values: tuple[Tensor, ...]
    mask: Tensor
    sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    features: tuple[Tensor | None, ...]
    keys: tuple[str, ...] = ()

    def of_sample(self, index: int, start: int, stop: int) -> BatchImages | None:
        """The images of one sample, whose tokens are ``[start, stop)``; None if it has none."""
        first = sum(self.counts[:index])
        last = first + self.counts[index]
        if first == last:
            return None
        begin = sum(f is None for f in self.features[:first])
        end = begin + sum(f is None for f in self.features[first:last])
        return BatchImages(
            pixel_values=self.pixel_values[begin:end],
            mask=self.mask[:, start:stop],
            sizes=self.sizes[first:last],
            counts=(self.counts[index],),
            features=self.features[first:last],
            keys=self.keys[first:last],
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> BatchImages:
        """Return a copy with `move` applied to every tensor."""
        return replace(
            self,
            pixel_values=tuple(map(move, self.pixel_values)),
            mask=move(self.mask),
            features=tuple(None if f is None else move(f) for f in self.features),
        )


class ImageProcessor(Protocol):
    """The half of an image model that needs no weights: the data pipeline uses it."""

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of one image; a row may have `max_length` tokens and these."""
        ...

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of `size` pixels (width, height)."""
        ...

    def preprocess(self, image: Any) -> np.ndarray:
        """Pixels ``[3, H, W]`` in float32 of a decoded RGB image."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What `num_tokens` depends on; part of the cache key of encoded rows."""
        ...


class ImageEmbedder(Protocol):
    """The half of an image model that has weights: training and generation use it."""

    def features(self, pixel_values: Sequence[Tensor]) -> Iterable[Tensor]:
        """The features ``[T, H]`` of each image ``[3, H, W]``."""
        ...

    def embed(self, input_ids: Tensor, images: BatchImages | None) -> Tensor:
        """Input embeddings ``[1, N, H]`` of token ids ``[1, N]``, those of images in their places.
        None is a batch without images: its embeddings go through the weights for images as well,
        with a dummy image (see `PackedCausalLM.always_embeds`)."""
        ...

    def weights(self) -> Iterable[Any]:
        """The parameters that only images use."""
        ...

    def positions(self, batch: Batch) -> Tensor:
        """The position ids of the language model for `batch`, which has images."""
        ...


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch, concatenated to a single row without padding.

    Attributes:
        input_ids: int64 ``[1, N]``.
        labels: int64 ``[1, N]``, aligned with `input_ids` (not shifted); IGNORE_INDEX for tokens
            without loss. The first token of every sequence is ignored: no token of the sequence
            precedes it.
        position_ids: int64 ``[1, N]``, starting at 0 in every sequence.
        cu_seqlens: int32 ``[S + 1]``, on the CPU: the start of each of the S sequences, then N.
        rows: Where each row came from, for messages.
        images: None for a batch of text.
        found: Labels, and the cached value of `predicting` for them.
        sequences_per_row: k; sequences ``k * i`` to ``k * i + k - 1`` belong to row i.
        weights: float32 ``[1, N]``, the loss weight of each label; None if all are 1.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    rows: tuple[RowRef, ...] = ()
    images: BatchImages | None = None
    found: tuple[Tensor, Tensor] | None = None
    sequences_per_row: int = 1
    weights: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the batch."""
        return int(self.input_ids.shape[-1])

    @property
    def num_sequences(self) -> int:
        """Number of sequences in the batch."""
        return len(self.cu_seqlens) - 1

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is supervised, int64 ``[S]``."""
        if self.found is not None and self.found[0] is self.labels:
            return self.found[1]
        return (self.labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def weights_of_predicting(self) -> Tensor | None:
        """Loss weight of each supervised token, float32 ``[S]``; None if all are 1."""
        return None if self.weights is None else self.weights[0, 1:][self.predicting]

    @property
    def sum_of_weights(self) -> float:
        """Sum of the loss weights of the supervised tokens; without weights, their number."""
        weights = self.weights_of_predicting
        return self.num_supervised if weights is None else float(weights.double().sum())

    @property
    def sequence_of_predicting(self) -> Tensor:
        """Index of the sequence that each supervised token belongs to, int64 ``[S]``."""
        import torch

        ends = self.cu_seqlens[1:].to(self.predicting.device, torch.int64)
        return torch.searchsorted(ends, self.predicting, right=True)

    def split(self) -> list[Batch]:
        """One batch per row."""
        k = self.sequences_per_row
        ends = self.cu_seqlens.tolist()[::k]
        return [
            replace(
                self,
                input_ids=self.input_ids[:, start:end],
                labels=self.labels[:, start:end],
                position_ids=self.position_ids[:, start:end],
                cu_seqlens=self.cu_seqlens[k * i : k * (i + 1) + 1] - start,
                rows=self.rows[i : i + 1],
                weights=None if self.weights is None else self.weights[:, start:end],
                images=self.images.of_sample(i, start, end) if self.images else None,
                found=None,
            )
            for i, (start, end) in enumerate(itertools.pairwise(ends))
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`; `cu_seqlens` stays on the CPU, where attention reads it.

        `predicting` is computed before the copy: on a GPU, `nonzero` would synchronize.
        """
        moved = self.moved(lambda tensor: tensor.to(device, non_blocking=True))
        predicting = self.predicting.to(device, non_blocking=True)
        return replace(moved, found=(moved.labels, predicting))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with `move` applied to every tensor except `cu_seqlens`."""
        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            images=self.images.moved(move) if self.images else None,
            weights=None if self.weights is None else move(self.weights),
        )


@dataclass(frozen=True)
class LossOutput:
    """Sums over a batch; the trainer divides them by the total count of the step.

    Attributes:
        loss: Scalar, float32.
        metrics: Scalars by name, as the algorithm declares them; logged, not backpropagated.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """The interface of an algorithm for the trainer and the data pipeline; see
    `xtuner.algorithms.base.BaseAlgorithm`."""

    @property
    def records(self) -> tuple[type, ...]:
        """Record types that the algorithm accepts."""
        ...

    @property
    def sequences_per_row(self) -> int:
        """Number of sequences that `encode` returns per row."""
        ...

    @property
    def overlong(self) -> str:
        """The value of the setting `overlong` that 'auto' selects."""
        ...

    @property
    def continues_text(self) -> bool:
        """Whether 'auto' selects the template 'plain' for a model without a chat template."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        ...

    def encode(self, record: Record, encoder: RecordEncoder) -> Sequence[Encoded]:
        """The sequences of a row; samples of their own if `sequences_per_row` is 1."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Concatenate samples to one batch."""
        ...

    def count(self, batch: Batch) -> float:
        """What `batch` adds to the divisor of the loss."""
        ...

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The loss of `batch`, summed."""
        ...
