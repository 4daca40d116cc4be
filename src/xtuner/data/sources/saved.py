"""Data sets that the `datasets` library saved to a folder (`save_to_disk`).

folder/dataset_dict.json      the splits of a DatasetDict, each a folder
folder/state.json             the arrow files of a Dataset
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.errors import DataError, did_you_mean

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(folder: Path, entry: str, *, split: str) -> list[Path] | None:
    """The arrow files of the data set that was saved to `folder`, in order; None if there is no
    such data set.

    Args:
        entry: Its name in messages.
        split: The split to read, if the folder has several.

    Raises:
        DataError: It has no such split, or lacks a file.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS, entry).get("splits")
        names = [name for name in splits if isinstance(name, str)] if splits else []
        if split not in names:
            allowed = ", ".join(names) or "(none)"
            raise DataError(
                f"data_path {entry!r}: is a saved data set without the split {split!r}; set "
                f"dataset_split to one of {allowed}{did_you_mean(split, names)}"
            )
        return saved_files(folder / split, f"{entry}/{split}", split=split) or _missing(
            entry, f"{split}/{_STATE}"
        )
    if not (folder / _STATE).is_file() or not (folder / "dataset_info.json").is_file():
        return None
    state = _read(folder / _STATE, entry)
    if state.get("_indices_data_files"):
        raise DataError(
            f"data_path {entry!r}: is a saved selection of rows; save "
            "`dataset.flatten_indices()` instead"
        )
    listed = state.get("_data_files")
    named = [file.get("filename") for file in listed] if isinstance(listed, list) else []
    files = [folder / Path(str(name)).name for name in named]
    for file in files:
        if not file.is_file():
            _missing(entry, file.name)
    return files


def _read(file: Path, entry: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data_path {entry!r}: {file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"data_path {entry!r}: {file.name} is not a JSON object")
    return value


def _missing(entry: str, name: str) -> list[Path]:
    raise DataError(
        f"data_path {entry!r}: is a saved data set that lacks {name}; save it again with "
        "dataset.save_to_disk"
    )
