"""Output folders that are created atomically.

target must be empty ──► enough disk? ──► fill a hidden sibling ──► flush to disk ──► rename
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from xtuner.errors import LaunchError
from xtuner.hub.links import refuse_links_out
from xtuner.models import manifest
from xtuner.models.save import flush, flush_tree

_SPARE = 64 * 2**20
"""Disk space in bytes required in addition to the weights: tokenizer, configuration, margin."""


@contextlib.contextmanager
def new_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """Yield an empty hidden folder that is renamed to `target` if the block succeeds.

    Args:
        target: A path that does not exist, or an empty folder.
        num_bytes: Size of the output, to check the free disk space.

    Raises:
        LaunchError: `target` is not empty, or the disk space is insufficient. Partial output is
            removed.
    """
    target = target.expanduser().absolute()
    check_free(target)
    parents = [path for path in target.parents if not path.exists()]
    draft = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(target, num_bytes)
        shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
        draft.mkdir()
        yield draft
        flush_tree(draft)
        if target.exists():
            target.rmdir()
        os.rename(draft, target)
        flush(target.parent)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        for path in parents:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise LaunchError(f"cannot write {target}: {error}") from error
        raise


def check_free(target: Path) -> None:
    """Raise LaunchError if `target` is a file or a folder that is not empty."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        what = "is not empty" if target.is_dir() else "is a file"
        raise LaunchError(f"{target}: {what}; give another folder, or remove this one first")


def copy_others(
    source: Path, draft: Path, *, only: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> None:
    """Copy files of `source` and its subfolders, except hidden ones, to `draft`; existing files are
    kept.

    Args:
        only, skip: Name patterns.

    Raises:
        ModelError: A link in `source` leads out of it.
    """
    refuse_links_out(source)
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inner.parts)
        selected = _matches(inner, only) and not _matches(inner, (*skip, manifest.FILE_NAME))
        if hidden or not selected or not path.is_file():
            continue
        copy = draft / inner
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns)


def _check_disk(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes + _SPARE:
        raise LaunchError(
            f"{target}: needs {(num_bytes + _SPARE) / 1e9:,.2f} GB of disk space, but "
            f"{free / 1e9:,.2f} GB are free; free some space, or give a folder on another disk"
        )
