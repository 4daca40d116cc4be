"""The manifest of a checkpoint: size and SHA-256 of each of its files.

It is written last and checked before the files are used, so that data corruption on disk or in
transfer is reported instead of silently changing the model. It does not prove who wrote the files.
Hashing uses one thread per file and runs at about disk speed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from xtuner.errors import CheckpointError
from xtuner.models.references import checkpoints_in

FILE_NAME = "manifest.json"
RESUME_ONLY = ("training_state.pt",)
"""Files that only `--resume` reads: they are not checked otherwise, and may be deleted."""
_VERSION = 1


def write(folder: Path) -> None:
    """Write ``folder/manifest.json`` over all files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / FILE_NAME]
    with ThreadPoolExecutor(_threads()) as pool:
        entries = list(pool.map(_entry, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    text = json.dumps(
        {"version": _VERSION, "files": dict(zip(names, entries, strict=True))}, indent=1
    )
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: Path, *, resuming: bool = False) -> None:
    """Compare the files of a checkpoint with its manifest; without one, nothing is checked.

    Args:
        folder: A checkpoint, or a part of one (``iter_N/llm_adapter``). Files that the manifest
            does not list are ignored.
        resuming: Also check the optimizer state.

    Raises:
        CheckpointError: Names the first file that is missing or changed, and the newest intact
            checkpoint of the same run.
    """
    problem = _first_problem(folder, resuming=resuming)
    if problem is None:
        return
    top, what = problem
    intact = next(_intact_beside(top, resuming=resuming), None)
    offer = (
        f"The newest intact checkpoint is {intact}" if intact else "No other checkpoint is intact"
    )
    raise CheckpointError(
        f"{what}. {offer}. If you changed the file yourself, delete {top / FILE_NAME}"
    )


def _first_problem(folder: Path, *, resuming: bool) -> tuple[Path, str] | None:
    """The folder of the manifest, and the first file of `folder` that differs from it."""
    candidates = (folder, folder.parent)
    top = next((path for path in candidates if (path / FILE_NAME).is_file()), None)
    if top is None:
        return None
    try:
        listed = _read(top)
    except (OSError, ValueError) as error:
        return top, f"{top / FILE_NAME}: is damaged: {error}"
    inner = folder.relative_to(top).as_posix()
    prefix = "" if inner == "." else f"{inner}/"
    wanted = {
        top / name: entry
        for name, entry in listed.items()
        if name.startswith(prefix) and (resuming or name not in RESUME_ONLY)
    }
    for path, entry in wanted.items():  # compare sizes first: that is cheap
        if not path.is_file():
            return top, f"{path}: is missing; the checkpoint is incomplete"
        if path.stat().st_size != entry["bytes"]:
            seen, should = path.stat().st_size, entry["bytes"]
            return top, f"{path}: is damaged: it has {seen:,} bytes, and {should:,} were written"
    with ThreadPoolExecutor(_threads()) as pool:
        for path, found in zip(wanted, pool.map(_entry, wanted), strict=True):
            if found != wanted[path]:
                return top, f"{path}: is damaged: its content differs from what was written"
    return None


def _intact_beside(checkpoint: Path, *, resuming: bool) -> Iterator[Path]:
    """Other checkpoints of the same run that are intact, newest first."""
    for path in reversed(checkpoints_in(checkpoint.absolute().parent)):
        if path != checkpoint.absolute() and _first_problem(path, resuming=resuming) is None:
            yield path


def _read(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The entries of the manifest in `folder`, by file name; ValueError if it is invalid."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        entries = dict(content["files"])
        for name, entry in entries.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is outside the folder")
            entries[name] = {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is not a manifest ({error!r})") from None
    return entries


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
