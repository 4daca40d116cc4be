"""Account for every row of a run: used, left out, cut or lost, and where the first of each are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xtuner.data.packing.order import Ints
from xtuner.data.packing.overlong import Fitted, Policy
from xtuner.data.report.data_report import Place, RowGroup, SourceReport
from xtuner.data.sources.resolve import PreparedSource
from xtuner.data.tokenize.store import KEPT_FAULTS, RowStore
from xtuner.errors import DataError, listed


@dataclass(frozen=True)
class Room:
    """How long a sample may be: max_length and, where the model sees, the tokens of an image."""

    max_length: int
    image: int = 0

    @property
    def tokens(self) -> int:
        """Most tokens of a sample."""
        return self.max_length + self.image

    def __str__(self) -> str:
        return self.in_tokens if self.image else f"max_length = {self.max_length:,}"

    @property
    def in_tokens(self) -> str:
        """The sum in words."""
        more = f" and the {self.image:,} of an image" if self.image else ""
        return f"max_length = {self.max_length:,} tokens{more}"


@dataclass(frozen=True)
class Encoded:
    """One source on its way: its files, their encoded rows, and the samples of at most `room`
    tokens per sequence made of them by `policy`."""

    source: PreparedSource
    store: RowStore
    fitted: Fitted
    room: Room
    policy: Policy

    def place(self, row: int) -> Place:
        """Where an encoded row came from."""
        return self._place(*self.store.place(row))

    def lost(self) -> list[RowGroup]:
        """The rows that cannot be used, by reason."""
        groups = [
            RowGroup(
                group.what,
                group.count,
                tuple(self._place(row.file, row.line, str(row.fault)) for row in group.first),
            )
            for group in self.store.faults
        ]
        if len(self.fitted.lost):
            groups.append(self._group(overlong_fault(self.policy, self.room), self.fitted.lost))
        return groups

    def changed(self) -> list[RowGroup]:
        """The rows that were made to fit max_length."""
        rows = np.setdiff1d(self.fitted.overlong, self.fitted.lost)
        if not len(rows):
            return []
        split = self.policy == "split"
        what = "split into pieces of at most" if split else "cut to"
        sum_of = f" ({self.room})" if self.room.image else ""
        return [self._group(f"{what} {self.room.tokens:,} tokens{sum_of}", rows)]

    def report(self, *, rows_used: int) -> SourceReport:
        """The account of the source."""
        names = [format.name for format in self.source.formats]
        lost = self.lost()
        usable = self.store.rows_read - sum(group.count for group in lost)
        return SourceReport(
            name=self.source.name,
            num_files=len(self.source.files),
            formats={name: names.count(name) for name in dict.fromkeys(names)},
            auto=self.source.asked_format == "auto",
            rows_read=self.store.rows_read,
            rows_used=rows_used,
            rows_left_out=usable - rows_used,
            lost=tuple(lost),
            changed=tuple(self.changed()),
        )

    def _group(self, what: str, rows: Ints) -> RowGroup:
        return RowGroup(what, len(rows), tuple(map(self.place, rows[:KEPT_FAULTS].tolist())))

    def _place(self, file: int, number: int, fault: str = "") -> Place:
        return Place(self.source.files[file].name, self.source.files[file].unit, number, fault)


def overlong_fault(policy: Policy, room: Room) -> str:
    """Why the setting `overlong` loses a row."""
    if policy == "truncate":
        return f"has no supervised token within {room}; raise max_length"
    return f"has more than {room.in_tokens}; raise max_length"


def refuse_unusable(encoded: Sequence[Encoded]) -> None:
    """Raise if a source has nothing to learn, or a row is too long and the settings forbid it.

    Raises:
        DataError: with the most frequent reasons and the first rows of each.
    """
    if any(each.policy == "error" for each in encoded):
        _refuse_overlong(encoded)
    problems = [
        _nothing_usable(each.source.name, each.store.rows_read, each.lost())
        for each in encoded
        if not len(each.fitted.samples)
    ]
    if problems:
        raise DataError("\n".join(problems))


def _refuse_overlong(encoded: Sequence[Encoded]) -> None:
    found = [
        (max(each.store.sequences_of(row)), each.place(row))
        for each in encoded
        for row in each.fitted.overlong.tolist()
    ]
    if not found:
        return
    first = [f"{place}: {length:,} tokens" for length, place in found[:10]]
    more = [f"and {len(found) - 10:,} more"] if len(found) > 10 else []
    headline = (
        f"{len(found):,} rows have more than {encoded[0].room.in_tokens}, the longest "
        f"{max(length for length, _ in found):,}. Raise max_length, or set overlong = 'truncate' "
        "or 'drop':"
    )
    raise DataError(listed(headline, [*first, *more]))


def _nothing_usable(name: str, rows_read: int, lost: Sequence[RowGroup]) -> str:
    reasons = [f"{group.count:,} rows: {group.what} ({group.places()})" for group in lost[:5]]
    if len(lost) > 5:
        reasons.append(f"and {len(lost) - 5} more reasons")
    hint = "`xtuner check-custom-dataset CONFIG` names every bad row"
    return listed(f"{name}: not one of {rows_read:,} rows can be used:", [*reasons, hint])


def duplicate_notes(learnt: npt.NDArray[np.uint64], aside: npt.NDArray[np.uint64]) -> list[str]:
    """Notes on rows of the same tokens, by the hashes of those trained on and those set aside."""
    notes = []
    if duplicates := num_duplicates(learnt, aside):
        total = len(learnt) + len(aside)
        notes.append(f"{duplicates:,} of {total:,} rows are the same as an earlier one")
    if shared := _num_shared(learnt, aside):
        notes.append(
            f"{shared:,} of the {len(aside):,} validation rows have a duplicate in the training: "
            "their loss says little"
        )
    return notes


def num_duplicates(*hashes: npt.NDArray[np.uint64]) -> int:
    """How many rows have the hash of another one before them."""
    # numpy's `unique` takes twenty times as long: it fills a hash table
    in_order = np.sort(np.concatenate(hashes))
    return int(np.count_nonzero(in_order[1:] == in_order[:-1]))


def _num_shared(learnt: npt.NDArray[np.uint64], aside: npt.NDArray[np.uint64]) -> int:
    """How many of the hashes `aside` are among those `learnt`."""
    in_order = np.sort(learnt)
    return int(np.sum(np.searchsorted(in_order, aside, "right") > np.searchsorted(in_order, aside)))
