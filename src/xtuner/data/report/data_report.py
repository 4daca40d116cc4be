"""Say what became of every row: a few lines for the terminal, all of it in data_report.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xtuner.data.packing.pack import PackedDataset

FILE_NAME = "data_report.json"
_SHOWN_PLACES = 5
_SHOWN_REASONS = 5


@dataclass(frozen=True)
class Place:
    """A row: its file, what its number counts ('line' or 'row'), and what is wrong with it."""

    file: str
    unit: str
    number: int
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


@dataclass(frozen=True)
class RowGroup:
    """Rows that share a fate: what happened to them, how many there are, and the first of them."""

    what: str
    count: int
    first: tuple[Place, ...]

    def places(self) -> str:
        """The first places in few words: ``lines 3, 8, 12, ...``."""
        shown = self.first[:_SHOWN_PLACES]
        more = ", ..." if self.count > len(shown) else ""
        if len({(place.file, place.unit) for place in self.first}) > 1:
            return ", ".join(map(str, shown)) + more
        unit = shown[0].unit + ("s" if self.count > 1 else "")
        return f"{unit} {', '.join(str(place.number) for place in shown)}{more}"


@dataclass(frozen=True)
class SourceReport:
    """The account of one source: ``rows_read == rows_used + rows_left_out + rows_lost``.

    Attributes:
        formats: format name to the number of files that are read by it.
        auto: whether the formats were picked by the columns.
        rows_used: rows that are trained on or measured with.
        rows_left_out: good rows that the mix or max_dataset_length leaves out.
        lost: rows that cannot be used, by reason.
        changed: rows that were cut or split to fit max_length; they are not lost.
    """

    name: str
    num_files: int
    formats: dict[str, int]
    auto: bool
    rows_read: int
    rows_used: int
    rows_left_out: int
    lost: tuple[RowGroup, ...]
    changed: tuple[RowGroup, ...]

    @property
    def rows_lost(self) -> int:
        """Rows that cannot be used."""
        return sum(group.count for group in self.lost)

    def lines(self) -> list[str]:
        """The account in plain words."""
        return [self._headline(), *(f"  {line}" for line in self._what_became())]

    def _headline(self) -> str:
        several = len(self.formats) > 1
        names = [f"{n} ({c:,} files)" if several else n for n, c in self.formats.items()]
        files = f" in {self.num_files:,} files" if self.num_files > 1 else ""
        picked = " (auto)" if self.auto else ""
        rows = _count(self.rows_read, "row")
        return f"{self.name}: {rows}{files}, format {', '.join(names)}{picked}"

    def _what_became(self) -> Iterator[str]:
        for group in self.lost[:_SHOWN_REASONS]:
            yield f"{_count(group.count, 'row')} lost: {group.what} ({group.places()})"
        if rest := sum(group.count for group in self.lost[_SHOWN_REASONS:]):
            yield f"{_count(rest, 'row')} lost for other reasons, see {FILE_NAME}"
        for group in self.changed:
            yield f"{_count(group.count, 'row')} {group.what} ({group.places()})"
        if self.rows_left_out:
            yield f"{_count(self.rows_left_out, 'row')} left out by the mix"


@dataclass(frozen=True)
class PartReport:
    """What training or validation is made of; `fill` is the share of the packs that has tokens."""

    samples: int
    tokens: int
    supervised_tokens: int
    packs: int
    fill: float

    @classmethod
    def of(cls, dataset: PackedDataset, max_length: int) -> PartReport:
        """Count what `dataset` holds."""
        tokens, packs = dataset.num_tokens, len(dataset)
        return cls(
            dataset.num_samples,
            tokens,
            dataset.num_supervised,
            packs,
            tokens / (packs * max_length),
        )


@dataclass(frozen=True)
class DataReport:
    """The account of all data of a run.

    Attributes:
        packed: whether samples share packs of max_length tokens.
        duplicates: used rows whose tokens are those of an earlier row.
        notes: what the user may want to know besides.
    """

    sources: tuple[SourceReport, ...]
    train: PartReport
    validation: PartReport | None
    max_length: int
    packed: bool
    duplicates: int
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The account in a few lines for the terminal."""
        body = [line for source in self.sources for line in source.lines()]
        body += [f"Note: {note}" for note in self.notes]
        lines = [f"{'' if i else 'Data':13}{line}" for i, line in enumerate(body)]
        lines.append(f"{'Training':13}{self._part(self.train)}")
        if self.validation is not None:
            lines.append(f"{'Validation':13}{self._part(self.validation)}")
        return lines

    def _part(self, part: PartReport) -> str:
        line = (
            f"{_count(part.samples, 'sample')}, {_count(part.tokens, 'token')} "
            f"({part.supervised_tokens:,} supervised)"
        )
        if self.packed:
            packs = _count(part.packs, "pack")
            line += f" in {packs} of {self.max_length:,} ({part.fill:.1%} full)"
        return line

    def write(self, folder: Path) -> Path:
        """Write all of the account to ``folder/data_report.json`` and return the file's path."""
        path = folder / FILE_NAME
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def as_dict(self) -> dict[str, Any]:
        """The account in plain values, with sums."""
        values = asdict(self)
        for source, report in zip(values["sources"], self.sources, strict=True):
            source["rows_lost"] = report.rows_lost
        for name in ("rows_read", "rows_used", "rows_left_out", "rows_lost"):
            values[name] = sum(source[name] for source in values["sources"])
        return values


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
