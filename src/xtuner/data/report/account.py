"""Account for every row of a run: used, left out, changed or lost, with example locations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from xtuner.data.packing.order import Ints
from xtuner.data.packing.overlong import Fitted, Policy
from xtuner.data.report.data_report import RowGroup, RowLocation, SourceReport
from xtuner.data.sources.resolve import PreparedSource
from xtuner.data.tokenize.faults import KEPT_FAULTS, FaultGroup
from xtuner.data.tokenize.store import RowStore
from xtuner.errors import DataError, count, listed

_OFTEN = 0.1
"""If more than this share of the rows is cut, the report says what follows from it."""
SEVERAL = "samples, since the chat template rewrites earlier turns"
"""What rows become if no single rendering matches the chat at every turn."""


@dataclass(frozen=True)
class LengthLimit:
    """The maximum length of a sample: max_length plus, with a vision tower, one image's tokens."""

    max_length: int
    image: int = 0

    @property
    def tokens(self) -> int:
        """Maximum tokens of a sample."""
        return self.max_length + self.image

    def __str__(self) -> str:
        return self.in_tokens if self.image else f"max_length = {self.max_length:,}"

    @property
    def in_tokens(self) -> str:
        """The limit in words."""
        more = f" plus {self.image:,} for one image" if self.image else ""
        return f"max_length = {self.max_length:,} tokens{more}"


@dataclass(frozen=True)
class EncodedSource:
    """A source with its encoded rows, and the samples that `policy` makes of them so that each
    sequence is within `limit`."""

    source: PreparedSource
    store: RowStore
    fitted: Fitted
    limit: LengthLimit
    policy: Policy

    def location(self, row: int) -> RowLocation:
        """Where an encoded row came from."""
        return self._location(*self.store.location(row))

    def lost(self) -> list[RowGroup]:
        """The rows that cannot be used, by reason."""
        groups = self._groups(self.store.faults)
        if len(self.fitted.lost):
            group = self._group(overlong_fault(self.policy, self.limit), self.fitted.lost)
            groups.append(replace(group, wanted=self.policy == "drop"))
        return groups

    def changed(self) -> list[RowGroup]:
        """The rows that are several samples, and those cut or split to fit max_length."""
        groups = []
        several = self.store.parts.row
        if len(several):
            split = np.unique(several).astype(np.int64)
            verb = "becomes" if len(split) == 1 else "become"
            groups.append(self._group(f"{verb} {len(several):,} {SEVERAL}", split))
        rows = np.setdiff1d(self.fitted.overlong, self.fitted.lost)
        if len(rows):
            cut = self.policy != "split"
            what = "cut to" if cut else "split into pieces of at most"
            terms = f" ({self.limit})" if self.limit.image else ""
            often = cut and len(rows) > _OFTEN * self.store.rows_read
            hint = ", so the model does not learn how they end: raise max_length" if often else ""
            groups.append(self._group(f"{what} {self.limit.tokens:,} tokens{terms}{hint}", rows))
        return groups

    def kept(self) -> list[RowGroup]:
        """The rows that are used although their tool calls are wrong, by reason."""
        return self._groups(self.store.kept)

    def report(self, *, rows_used: int) -> SourceReport:
        """The report of the source."""
        names = [format.name for format in self.source.formats]
        lost = self.lost()
        usable = self.store.rows_read - sum(group.count for group in lost)
        return SourceReport(
            name=self.source.name,
            num_files=len(self.source.files),
            formats={name: names.count(name) for name in dict.fromkeys(names)},
            auto=self.source.requested_format == "auto",
            rows_read=self.store.rows_read,
            rows_used=rows_used,
            rows_left_out=usable - rows_used,
            lost=tuple(lost),
            changed=tuple(self.changed()),
            kept=tuple(self.kept()),
        )

    def _groups(self, faults: Sequence[FaultGroup]) -> list[RowGroup]:
        return [
            RowGroup(
                group.what,
                group.count,
                tuple(self._location(row.file, row.line, str(row.fault)) for row in group.first),
            )
            for group in faults
        ]

    def _group(self, what: str, rows: Ints) -> RowGroup:
        return RowGroup(what, len(rows), tuple(map(self.location, rows[:KEPT_FAULTS].tolist())))

    def _location(self, file: int, number: int, fault: str = "") -> RowLocation:
        return RowLocation(
            self.source.files[file].name, self.source.files[file].unit, number, fault
        )


def overlong_fault(policy: Policy, limit: LengthLimit) -> str:
    """Why the setting `overlong` discards a row."""
    if policy == "truncate":
        return f"has no supervised token within {limit}; raise max_length"
    return f"has more than {limit.in_tokens}; raise max_length"


def refuse_unusable(encoded: Sequence[EncodedSource]) -> None:
    """Raise if a source has no usable row, or a row is too long and `overlong` is 'error'.

    Raises:
        DataError: Lists the most frequent reasons and the first rows of each.
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


def _refuse_overlong(encoded: Sequence[EncodedSource]) -> None:
    found = [
        (max(each.store.sequences_of(row)), each.location(row))
        for each in encoded
        for row in each.fitted.overlong.tolist()
    ]
    if not found:
        return
    first = [f"{location}: {length:,} tokens" for length, location in found[:10]]
    more = [f"and {len(found) - 10:,} more"] if len(found) > 10 else []
    rows = count(len(found), "row has", "rows have")
    headline = (
        f"{rows} more than {encoded[0].limit.in_tokens}; the longest has "
        f"{max(length for length, _ in found):,}. Raise max_length, or set overlong = 'truncate' "
        "or 'drop':"
    )
    raise DataError(listed(headline, [*first, *more]))


def _nothing_usable(name: str, rows_read: int, lost: Sequence[RowGroup]) -> str:
    reasons = [
        f"{count(group.count, 'row')}: {group.what} ({group.locations()})" for group in lost[:5]
    ]
    if len(lost) > 5:
        reasons.append(f"and {count(len(lost) - 5, 'more reason')}")
    hint = "`xtuner check-custom-dataset CONFIG` lists every bad row"
    none = f"none of its {rows_read:,} rows can" if rows_read > 1 else "its only row cannot"
    return listed(f"{name}: {none} be used:", [*reasons, hint])


def duplicate_notes(train: npt.NDArray[np.uint64], validation: npt.NDArray[np.uint64]) -> list[str]:
    """Notes on duplicates, by the hashes of the training and validation rows."""
    notes = []
    if duplicates := num_duplicates(train, validation):
        total = len(train) + len(validation)
        verb = "duplicates" if duplicates == 1 else "duplicate"
        notes.append(f"{duplicates:,} of {total:,} rows {verb} an earlier row")
    if shared := _num_shared(train, validation):
        verb = "is" if shared == 1 else "are"
        notes.append(
            f"{shared:,} of {count(len(validation), 'validation row')} {verb} also in the training "
            "data, which makes the validation loss less meaningful"
        )
    return notes


def num_duplicates(*hashes: npt.NDArray[np.uint64]) -> int:
    """Number of rows with the hash of an earlier row."""
    # np.unique builds a hash table and takes twenty times as long
    in_order = np.sort(np.concatenate(hashes))
    return int(np.count_nonzero(in_order[1:] == in_order[:-1]))


def _num_shared(train: npt.NDArray[np.uint64], validation: npt.NDArray[np.uint64]) -> int:
    """Number of `validation` hashes that are in `train`."""
    in_order = np.sort(train)
    right = np.searchsorted(in_order, validation, "right")
    return int(np.sum(right > np.searchsorted(in_order, validation)))
