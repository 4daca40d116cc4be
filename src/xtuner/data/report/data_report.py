"""The data report: a summary for the terminal, and the complete report in data_report.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xtuner.data.packing.pack import PackedDataset
from xtuner.errors import DataError, count, listed

FILE_NAME = "data_report.json"
_MAX_LOCATIONS = 5
_MAX_REASONS = 5


@dataclass(frozen=True)
class RowLocation:
    """The location of a row: its file, its number, what the number counts ('line' or 'row'), and
    the fault of the row, if any."""

    file: str
    unit: str
    number: int
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


@dataclass(frozen=True)
class RowGroup:
    """Rows with the same outcome: what happened to them, their number, and the first of them;
    `wanted` if a setting asks for it."""

    what: str
    count: int
    first: tuple[RowLocation, ...]
    wanted: bool = False

    def locations(self) -> str:
        """The first locations, such as ``lines 3, 8, 12, ...``."""
        shown = self.first[:_MAX_LOCATIONS]
        more = ", ..." if self.count > len(shown) else ""
        if len({(location.file, location.unit) for location in self.first}) > 1:
            return ", ".join(map(str, shown)) + more
        unit = shown[0].unit + ("s" if self.count > 1 else "")
        return f"{unit} {', '.join(str(location.number) for location in shown)}{more}"


@dataclass(frozen=True)
class SourceReport:
    """The report on one source: ``rows_read == rows_used + rows_left_out + rows_lost``.

    Attributes:
        formats: Format name to the number of files in this format.
        auto: Whether the formats were selected by the columns.
        rows_used: Rows used for training or validation.
        rows_left_out: Usable rows that the mix or max_dataset_length leaves out.
        lost: Rows that cannot be used, by reason.
        changed: Rows that are several samples, or were cut or split to fit max_length; they are not
            lost.
        kept: Rows that are used although their tool calls are wrong (tool_call_errors = 'keep'), by
            reason.
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
    kept: tuple[RowGroup, ...] = ()

    def too_many_lost(self, limit: float) -> str | None:
        """The problem if more than `limit` of the rows are lost."""
        groups = [group for group in self.lost if not group.wanted]
        lost = sum(group.count for group in groups)
        if lost <= limit * self.rows_read:
            return None
        reasons = [
            f"{count(group.count, 'row')}: {group.what} ({group.locations()})"
            for group in groups[:_MAX_REASONS]
        ]
        return listed(
            f"{self.name}: {lost:,} of {self.rows_read:,} rows cannot be used, "
            f"{lost / self.rows_read:.1%}, more than max_lost_rows = {limit:g} allows:",
            [
                *reasons,
                "Fix the rows (`xtuner check-custom-dataset CONFIG` lists them), choose another "
                "dataset_format or prompt_template,",
                "or train without them: --set max_lost_rows=1",
            ],
        )

    @property
    def rows_lost(self) -> int:
        """Rows that cannot be used."""
        return sum(group.count for group in self.lost)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        return [self._headline(), *(f"  {line}" for line in self._details())]

    def _headline(self) -> str:
        several = len(self.formats) > 1
        names = [f"{n} ({count(c, 'file')})" if several else n for n, c in self.formats.items()]
        files = f" in {self.num_files:,} files" if self.num_files > 1 else ""
        auto = " (auto)" if self.auto else ""
        rows = count(self.rows_read, "row")
        return f"{self.name}: {rows}{files}, format {', '.join(names)}{auto}"

    def _details(self) -> Iterator[str]:
        for group in self.lost[:_MAX_REASONS]:
            yield f"{count(group.count, 'row')} lost: {group.what} ({group.locations()})"
        if rest := sum(group.count for group in self.lost[_MAX_REASONS:]):
            yield f"{count(rest, 'row')} lost for other reasons, see {FILE_NAME}"
        for group in self.kept[:_MAX_REASONS]:
            yield f"{count(group.count, 'row')} kept: {group.what} ({group.locations()})"
        if rest := sum(group.count for group in self.kept[_MAX_REASONS:]):
            yield f"{count(rest, 'row')} kept with other wrong calls, see {FILE_NAME}"
        for group in self.changed:
            yield f"{count(group.count, 'row')} {group.what} ({group.locations()})"
        if self.rows_left_out:
            yield f"{count(self.rows_left_out, 'row')} left out by the mix"


@dataclass(frozen=True)
class PartReport:
    """The size of the training or validation data; `fill` is the used share of the packs, of
    `pack_length` tokens each."""

    samples: int
    tokens: int
    supervised_tokens: int
    packs: int
    fill: float
    pack_length: int

    @classmethod
    def of(cls, dataset: PackedDataset, pack_length: int) -> PartReport:
        """Count the contents of `dataset`."""
        tokens, packs = dataset.num_tokens, len(dataset)
        return cls(
            dataset.num_samples,
            tokens,
            dataset.num_supervised,
            packs,
            tokens / (packs * pack_length),
            pack_length,
        )


@dataclass(frozen=True)
class DataReport:
    """The report on all data of a run.

    Attributes:
        packed: Whether samples are packed to max_length tokens.
        duplicates: Used rows with the same tokens as an earlier row.
        notes: Further notes for the user.
    """

    sources: tuple[SourceReport, ...]
    train: PartReport
    validation: PartReport | None
    max_length: int
    packed: bool
    duplicates: int
    notes: tuple[str, ...] = field(default=())

    def refuse_lost(self, limit: float) -> None:
        """Raise if a source loses a larger share of its rows than `limit`.

        Raises:
            DataError: Lists the reasons and what to do.
        """
        problems = [problem for s in self.sources if (problem := s.too_many_lost(limit))]
        if problems:
            raise DataError("\n".join(problems))

    def lines(self) -> list[str]:
        """The summary for the terminal."""
        body = [line for source in self.sources for line in source.lines()]
        body += [f"Note: {note}" for note in self.notes]
        lines = [f"{'' if i else 'Data':13}{line}" for i, line in enumerate(body)]
        lines.append(f"{'Training':13}{self._part(self.train)}")
        if self.validation is not None:
            lines.append(f"{'Validation':13}{self._part(self.validation)}")
        return lines

    def _part(self, part: PartReport) -> str:
        line = (
            f"{count(part.samples, 'sample')}, {count(part.tokens, 'token')} "
            f"({part.supervised_tokens:,} supervised)"
        )
        if self.packed:
            packs = count(part.packs, "pack")
            line += f" in {packs} of {part.pack_length:,} ({part.fill:.1%} full)"
        return line

    def write(self, folder: Path) -> Path:
        """Write the complete report to ``folder/data_report.json`` and return its path."""
        path = folder / FILE_NAME
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def as_dict(self) -> dict[str, Any]:
        """The report as a dict, with totals."""
        values = asdict(self)
        for source, report in zip(values["sources"], self.sources, strict=True):
            source["rows_lost"] = report.rows_lost
        for name in ("rows_read", "rows_used", "rows_left_out", "rows_lost"):
            values[name] = sum(source[name] for source in values["sources"])
        return values
