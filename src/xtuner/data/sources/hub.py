"""Read a data set on the hub with the `datasets` library, which only this module uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xtuner.data.sources.rows import RawRow, Unit, without_nulls
from xtuner.errors import DataError, did_you_mean, first_line


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set; `table` is a ``datasets.Dataset``."""

    name: str
    table: Any
    unit: Unit = "row"
    note: str = ""

    @property
    def size(self) -> int:
        """Size of the table in bytes."""
        return max(int(self.table.info.size_in_bytes or 0), len(self.table), 1)

    def digest(self) -> str:
        """The fingerprint of the table."""
        return str(self.table._fingerprint)

    def rows(self) -> Iterator[RawRow]:
        """Iterate over the table."""
        size, total = self.size, len(self.table)
        for number, row in enumerate(self.table, 1):
            yield RawRow(number, without_nulls(row), size * number // total)


def open_split(entry: str, *, split: str) -> HubSplit:
    """Load `split` of the data set `entry` ('owner/name' or 'owner/name:configuration').

    Raises:
        DataError: `datasets` is not installed, or the data set or split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data_path {entry!r}: is not a local path, and reading from the hub requires the "
            "package datasets: pip install 'xtuner[hub]'"
        ) from error
    name, _, configuration = entry.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many types, including network errors
        raise _explained(entry, name, configuration, split, error) from error
    return HubSplit(entry, table)


def _explained(
    entry: str, name: str, configuration: str, split: str, error: Exception
) -> DataError:
    reason = first_line(error)
    if "split" in reason.lower():
        import datasets

        try:
            allowed = datasets.get_dataset_split_names(name, configuration or None)
        except Exception:
            allowed = []
        if allowed:
            return DataError(
                f"data_path {entry!r}: has no split {split!r}; set dataset_split to one of "
                f"{', '.join(allowed)}{did_you_mean(split, allowed)}"
            )
    return DataError(
        f"data_path {entry!r}: is neither a local path nor a reachable data set on the hub: "
        f"{reason}"
    )
