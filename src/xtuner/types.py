"""The values that travel between the parts of xtuner, and the protocol of an algorithm.

    row (dict) ──format──► Conversation | Text ──template──► Encoded ──pack──► Sample list
    ──collate──► Batch ──loss──► LossOutput

Nothing here imports torch at run time: ``xtuner list-cfg`` must answer at once.
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
"""Label of a token that the loss leaves out (the value of torch's `cross_entropy`)."""

IMAGE = "<image>"
"""Where an image stands in the text of a message; one token, which becomes one per patch."""

Role = Literal["system", "user", "assistant", "tool"]
Row = Mapping[str, Any]
"""One row of a data file, as read."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `loss` overrides what is supervised: None means the default (assistant turns are, others are
    not), False leaves an assistant turn out. `images` names the images of the turn, one for each
    ``<image>`` in `content`, in this order.
    """

    role: Role
    content: str
    loss: bool | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    images: tuple[str, ...] = ()

    @property
    def supervised(self) -> bool:
        """Whether the tokens of this turn enter the loss."""
        return self.role == "assistant" and self.loss is not False

    def as_dict(self) -> dict[str, Any]:
        """The turn in the form that `tokenizer.apply_chat_template` takes."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True)
class Conversation:
    """Messages in order and the JSON schemas of the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The images of all messages, in order."""
        return tuple(name for message in self.messages for name in message.images)


@dataclass(frozen=True)
class Text:
    """Plain text for continued pretraining: every token but the first is supervised."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two conversations of which the first is better; most often the same prompt with two
    answers."""

    chosen: Conversation
    rejected: Conversation


Record = Conversation | Text | Preference
"""What a dataset format makes of a row."""


class Encoded(NamedTuple):
    """Token ids and, aligned with them, whether each token is a target of the loss."""

    input_ids: list[int]
    loss_mask: list[bool]


class RecordEncoder(Protocol):
    """Turns the parts of a record into token ids, with the template and tokenizer of the run."""

    def conversation(self, record: Conversation) -> Encoded:
        """The text of the template; what the assistant says is supervised."""
        ...

    def text(self, record: Text) -> Encoded:
        """The text with the tokenizer's begin and end; all but the first token supervised."""
        ...


@dataclass(frozen=True)
class RowRef:
    """Where a row came from: `source` is a path or hub name, `line` counts from 1; `unit` says
    what it counts, 'line' or 'row'."""

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
    the images whose tokens are among these, and the lengths of its sequences where it has
    several."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row: RowRef
    images: tuple[ImageRef, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; one of them for most algorithms."""
        return self.lengths or (len(self.input_ids),)


@dataclass(frozen=True)
class BatchImages:
    """The P images of a batch, in the order of their tokens.

    Attributes:
        pixel_values: float32 ``[3, H, W]`` of each image that has to go through the vision tower.
        mask: bool ``[1, N]``, true at the tokens of images.
        sizes: width and height in pixels of each of the P images as decoded.
        counts: number of images of each sample.
        features: for each of the P images what the vision tower made of it ``[T, H]``, or None
            where it is the next of `pixel_values`.
        keys: for each image a hash of its content, where features are kept; else empty.
    """

    pixel_values: tuple[Tensor, ...]
    mask: Tensor
    sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    features: tuple[Tensor | None, ...]
    keys: tuple[str, ...] = ()

    def of_sample(self, index: int, start: int, stop: int) -> BatchImages | None:
        """Those of one sample, whose tokens are ``[start, stop)``; None if it has none."""
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
        """The same with `move` called on every tensor."""
        return replace(
            self,
            pixel_values=tuple(map(move, self.pixel_values)),
            mask=move(self.mask),
            features=tuple(None if f is None else move(f) for f in self.features),
        )


class ImageProcessor(Protocol):
    """The half of an image model that needs no weights: what lays out data uses it."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of one image; a row may have `max_length` tokens and these."""
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

    def embed(self, input_ids: Tensor, images: BatchImages) -> Tensor:
        """Input embeddings ``[1, N, H]`` of token ids ``[1, N]``, those of images in their
        places."""
        ...

    def positions(self, batch: Batch) -> Tensor:
        """The position ids that the language model takes for `batch`, which has images."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-step's samples, laid end to end in a single row without padding.

    Attributes:
        input_ids: int64 ``[1, N]``.
        labels: int64 ``[1, N]``, aligned with `input_ids` (not shifted); IGNORE_INDEX where there
            is no
            loss. The first token of every sample is ignored: nothing of its own sample predicts it.
        position_ids: int64 ``[1, N]``, counting from 0 in every sample.
        cu_seqlens: int32 ``[S + 1]``, on the CPU: where each of the S sequences begins, then N.
        rows: where each row came from, for messages about it.
        images: None for a batch of text.
        found: labels, and what `predicting` has found in them.
        sequences_per_row: k; sequences ``k * i`` to ``k * i + k - 1`` are those of row i.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    rows: tuple[RowRef, ...] = ()
    images: BatchImages | None = None
    found: tuple[Tensor, Tensor] | None = None
    sequences_per_row: int = 1

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
        """Number of tokens that the loss sums over."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is supervised, int64 ``[S]``."""
        if self.found is not None and self.found[0] is self.labels:
            return self.found[1]
        return (self.labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]

    @property
    def sequence_of_predicting(self) -> Tensor:
        """The number of the sequence that each supervised token belongs to, int64 ``[S]``."""
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
                images=self.images.of_sample(i, start, end) if self.images else None,
                found=None,
            )
            for i, (start, end) in enumerate(itertools.pairwise(ends))
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`; `cu_seqlens` stays on the CPU, where it steers the attention.

        What is to be predicted is found before: a GPU would have to be waited for.
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        moved, predicting = self.moved(move), move(self.predicting)
        return replace(moved, found=(moved.labels, predicting))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same with `move` called on every tensor but `cu_seqlens`."""
        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            images=self.images.moved(move) if self.images else None,
        )


@dataclass(frozen=True)
class LossOutput:
    """Sums over a batch; the trainer divides them by the count of the whole step.

    Attributes:
        loss: scalar, float32.
        metrics: scalars by name, those that the algorithm declares; logged, never backpropagated.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """What the trainer and the data part know of an algorithm; see
    `xtuner.algorithms.base.BaseAlgorithm` for the meaning of each."""

    @property
    def records(self) -> tuple[type, ...]:
        """Kinds of records that a row may be."""
        ...

    @property
    def sequences_per_row(self) -> int:
        """Sequences that `encode` makes of a row."""
        ...

    @property
    def overlong(self) -> str:
        """What the setting `overlong` = 'auto' means."""
        ...

    @property
    def continues_text(self) -> bool:
        """Whether a model without a chat template gets none."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        ...

    def encode(self, record: Record, encoder: RecordEncoder) -> Sequence[Encoded]:
        """The sequences of a row."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples into one batch."""
        ...

    def count(self, batch: Batch) -> float:
        """The share of `batch` in the divisor of the loss."""
        ...

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss of `batch`, summed."""
        ...
