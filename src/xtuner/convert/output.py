"""Result folders that are there whole or not at all.

target refused if taken ──► enough disk? ──► hidden sibling filled ──► flushed to disk ──► renamed
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
"""Bytes of the disk that stay free beside the weights: tokenizer, configuration, and some air."""


@contextlib.contextmanager
def new_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """Give an empty hidden folder that becomes `target` if the block ends without error.

    Args:
        target: must not exist, or be an empty folder.
        num_bytes: what will be written, to compare with the free disk space.

    Raises:
        LaunchError: `target` is taken, or the disk is too full. Nothing is left behind.
    """
    target = target.absolute()
    refuse_taken(target)
    parents = [path for path in target.parents if not path.exists()]
    draft = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(target, num_bytes)
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
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


def refuse_taken(target: Path) -> None:
    """Raise LaunchError if `target` is a file or a folder with something in it."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        what = "holds files already" if target.is_dir() else "is a file"
        raise LaunchError(f"{target}: {what}; give another folder, or remove this one first")


def copy_others(
    source: Path, draft: Path, *, only: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> None:
    """Copy files of `source` and its subfolders into `draft`; what is there already is kept.

    Args:
        source: hidden files and folders in it are left out.
        draft: where to.
        only, skip: patterns of names.

    Raises:
        ModelError: a link in `source` leads out of it.
    """
    refuse_links_out(source)
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inner.parts)
        wanted = _fits(inner, only) and not _fits(inner, (*skip, manifest.FILE_NAME))
        if hidden or not wanted or not path.is_file():
            continue
        place = draft / inner
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns)


def _check_disk(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes + _SPARE:
        raise LaunchError(
            f"{target}: needs {(num_bytes + _SPARE) / 1e9:,.2f} GB of disk, "
            f"{free / 1e9:,.2f} GB are free; make room, or give a folder on another disk"
        )
