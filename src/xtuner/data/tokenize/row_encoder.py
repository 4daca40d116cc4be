"""Encode one row: convert it by its format, check its calls, and let the algorithm encode it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from xtuner import plugins
from xtuner.calls.check import CallPolicy, Problem
from xtuner.data.formats.base import Format, RowError
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.sources.rows import Fault, Task
from xtuner.errors import ConfigError, XTunerError, count, message_of
from xtuner.templates.base import Template
from xtuner.types import Algorithm, Conversation, Encoded, ImageRef, Preference, Record, Row, Text

PIECE = 200_000
"""Maximum characters per tokenizer call, which needs about 200 bytes for each."""

_NO_IMAGES = "are present, but the model does not take images; set visual_encoder_name_or_path"


class EncodedRow(NamedTuple):
    """An encoded row: its sequences, the images of each, and what is wrong with its calls if it is
    used nevertheless."""

    parts: list[Encoded]
    images: tuple[tuple[ImageRef, ...], ...]
    kept: Fault | None = None


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a source.

    Attributes:
        formats: The format of each file of the source.
        template: Renders conversations.
        tokenizer: The tokenizer of the trained model; encodes plain text.
        algorithm: Defines the accepted records and their sequences.
        image_layout: How images are expanded to tokens; None for a model without a vision tower.
        vocab_size: Rows with token ids from here on cannot be used; None if there are none.
        calls: What happens to wrong tool calls and to thoughts.
    """

    formats: Sequence[Format]
    template: Template
    tokenizer: Any
    algorithm: Algorithm
    image_layout: ImageLayout | None = None
    vocab_size: int | None = None
    calls: CallPolicy = field(default_factory=CallPolicy)

    def _record(self, task: Task) -> Record | Fault:
        """The record to encode."""
        row = task.row.parsed()
        record = row if isinstance(row, Fault) else self._converted(row, self.formats[task.file])
        if isinstance(record, Fault):
            return record
        checked = self.calls.applied(record)
        return _fault(checked) if isinstance(checked, Problem) else checked

    def encode(self, task: Task) -> EncodedRow | Fault:
        """Encode one row and check its images."""
        record = self._record(task)
        if isinstance(record, Fault):
            return record
        problem = self.calls.problem(record) if self.calls.errors == "keep" else None
        kept = None if problem is None else _fault(problem)
        images = _images_of(record)
        if images and self.image_layout is None:
            return Fault(_NO_IMAGES, "images")
        if images and isinstance(record, Preference):
            return Fault("a preference with images cannot be trained on yet", "images")
        parts = self._encode(record)
        if isinstance(parts, Fault):
            return parts
        if self.image_layout is None or isinstance(record, Preference):
            return EncodedRow(parts, ((),) * len(parts), kept)
        expanded = self._expanded(parts, images, self.image_layout)
        return expanded if isinstance(expanded, Fault) else expanded._replace(kept=kept)

    def _expanded(
        self, parts: Sequence[Encoded], images: Sequence[str], layout: ImageLayout
    ) -> EncodedRow | Fault:
        """The row with its image tokens repeated. Each sequence of a conversation shows the first
        of its images; the first sequence shows most."""
        found: list[tuple[Encoded, tuple[ImageRef, ...]]] = []
        for part in parts:
            shown = images[: part.input_ids.count(layout.token_id)] if found else images
            expanded = layout.expanded(part, shown)
            if isinstance(expanded, Fault):
                return expanded
            found.append(expanded)
        return EncodedRow([part for part, _ in found], tuple(refs for _, refs in found))

    def _encode(self, record: Record) -> list[Encoded] | Fault:
        algorithm = self.algorithm
        if not isinstance(record, algorithm.records):
            expected = " or ".join(kind.__name__ for kind in algorithm.records)
            return Fault(
                f"is read as {type(record).__name__}, but this algorithm requires {expected}; set "
                "another dataset_format or algorithm"
            )
        try:
            parts = list(algorithm.encode(record, self))
        except Exception as error:  # templates are third-party code; one row must not stop the run
            return Fault(_one_line(error))
        if wrong := next((part for part in parts if not isinstance(part, Encoded)), None):
            raise ConfigError(
                f"{type(algorithm).__name__}.encode made a {type(wrong).__name__}; every sequence "
                "must be an Encoded of xtuner.types, as encoder.conversation and encoder.text give"
            )
        if not parts or len(parts) != algorithm.sequences_per_row != 1:
            raise ConfigError(
                f"{type(algorithm).__name__}.encode returned {count(len(parts), 'sequence')} for a "
                f"row, but its sequences_per_row is {algorithm.sequences_per_row}"
            )
        if any(part.weights is not None for part in parts):
            self._check_weights(parts)
        size = self.vocab_size
        if size is not None and (fault := self._without_embedding(parts, size)):
            return fault
        if not all(any(part.loss_mask[1:]) for part in parts):
            return Fault("has no supervised tokens, so it has no effect on training")
        return parts

    def _check_weights(self, parts: Sequence[Encoded]) -> None:
        name = type(self.algorithm).__name__
        if not _takes_weights(self.algorithm):
            raise ConfigError(
                f"the data have loss weights, but {name}.loss does not declare that it uses them: "
                "multiply by batch.weights_of_predicting, divide by batch.sum_of_weights, and set "
                f"takes_weights = True in {name}; or remove the weights from the data"
            )
        for part in parts:
            if part.weights is not None and len(part.weights) != len(part.input_ids):
                raise ConfigError(
                    f"{name}.encode returned {count(len(part.weights), 'weight')} for "
                    f"{count(len(part.input_ids), 'token')}"
                )

    def _without_embedding(self, parts: Sequence[Encoded], size: int) -> Fault | None:
        """The fault of a row whose token ids exceed the model's embedding of `size` rows."""
        image = self.image_layout.token_id if self.image_layout else None
        beyond = (id for part in parts for id in part.input_ids if id >= size and id != image)
        if (token := next(beyond, None)) is None:
            return None
        return Fault(
            "has a token for which the model has no embedding; set resize_embeddings = True, "
            "remove it, or give the tokenizer that belongs to the model",
            detail=f"{self.tokenizer.convert_ids_to_tokens(token)!r}, id {token}",
        )

    def _converted(self, row: Row, format: Format) -> Record | Fault:
        try:
            return format.convert(row)
        except RowError as error:
            hint = f"; {error.hint}" if error.hint else ""
            return Fault(error.problem + hint, error.field)
        except Exception as error:  # a format may be the user's own code
            return Fault(f"format {format.name!r} raised {_one_line(error)}")

    def conversation(self, record: Conversation) -> Encoded:
        """Encode a conversation to one sequence; assistant turns are supervised."""
        return self.template.encode(record)

    def sequences(self, record: Conversation) -> Sequence[Encoded]:
        """Encode a conversation to the sequences that together supervise each assistant turn."""
        return self.template.sequences(record)

    def text(self, record: Text) -> Encoded:
        """Encode text with the tokenizer's BOS and EOS; all but the first token are supervised."""
        ids: list[int] = []
        for piece in _pieces(record.text):
            ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[:1] != self._first:
            ids[:0] = self._first
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return Encoded(ids, [False] + [True] * (len(ids) - 1))

    @cached_property
    def _first(self) -> list[int]:
        """The BOS token, if the tokenizer adds one by default."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []


def _fault(problem: Problem) -> Fault:
    return Fault(f"{problem.problem}; {problem.hint}", problem.where)


def _images_of(record: Record) -> tuple[str, ...]:
    match record:
        case Conversation():
            return record.images
        case Preference():
            return (*record.chosen.images, *record.rejected.images)
    return ()


def _takes_weights(algorithm: Algorithm) -> bool:
    """Whether the class that defines `algorithm.loss`, or one derived from it, says so."""
    for kind in type(algorithm).__mro__:
        if "takes_weights" in vars(kind):
            return bool(vars(kind)["takes_weights"])
        if "loss" in vars(kind):
            return False
    return False


def _pieces(text: str) -> Iterator[str]:
    """Split a very long text after line ends, otherwise before spaces."""
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start + 1, start + PIECE) + 1
        stop = stop or text.rfind(" ", start + 1, start + PIECE)
        stop = stop if stop > start else start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _one_line(error: Exception) -> str:
    known = isinstance(error, ValueError | XTunerError) and not plugins.user_location(error)
    return message_of(error) if known else plugins.described(error)
