"""Cache the packing of large data sets on disk.

<cache>/packs/<hash of lengths, order and capacity>.npz    members int32 [S], boundaries int32 [P+1]

Files are written atomically. A plan that is read is validated; if it is invalid, or the disk is
full, the samples are packed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import zipfile
from pathlib import Path

import numpy as np

from xtuner.cache_dir import cache_dir
from xtuner.data.packing.order import Ints
from xtuner.data.packing.pack import pack
from xtuner.data.packing.samples import Ints32

MIN_CACHED = 20_000
"""Packing this many samples takes as long as reading a plan; smaller plans are not cached."""

_VERSION = 1
"""Increment it when the result of `pack` changes."""


def planned(lengths: Ints | Ints32, capacity: int, *, order: Ints) -> tuple[Ints, Ints]:
    """The result of `pack` for the same arguments, from the cache if possible."""
    if len(order) <= MIN_CACHED:
        return pack(lengths, capacity, order=order)
    file = _file(lengths, capacity, order)
    plan = _read(file, lengths, capacity, order)
    if plan is None:
        plan = pack(lengths, capacity, order=order)
        _write(file, *plan)
    return plan


def _file(lengths: Ints | Ints32, capacity: int, order: Ints) -> Path:
    digest = hashlib.sha256(f"{_VERSION} {capacity}".encode())
    for array in (lengths, order):
        digest.update(np.ascontiguousarray(array, dtype=np.int32).data)
    return cache_dir() / "packs" / f"{digest.hexdigest()[:32]}.npz"


def _read(
    file: Path, lengths: Ints | Ints32, capacity: int, order: Ints
) -> tuple[Ints, Ints] | None:
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as kept:
            members, starts = (kept[name].astype(np.int64) for name in ("members", "boundaries"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    valid = (
        members.shape == order.shape
        and _same_numbers(members, order)
        and starts[0] == 0
        and starts[-1] == len(members)
        and bool(np.all(starts[1:] > starts[:-1]))
        and int(np.add.reduceat(lengths[members], starts[:-1], dtype=np.int64).max()) <= capacity
    )
    return (members, starts) if valid else None


def _same_numbers(members: Ints, order: Ints) -> bool:
    """Whether `members` contains each number of `order`, which are unique, once."""
    top = int(order.max())
    if int(members.min()) < 0 or int(members.max()) > top:
        return False
    seen = np.zeros(top + 1, dtype=np.bool_)
    seen[members] = True
    return bool(seen[order].all())


def _write(file: Path, members: Ints, starts: Ints) -> None:
    draft = file.with_name(f".{file.stem}.{os.getpid()}-{secrets.token_hex(4)}.npz")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(draft, members=members.astype(np.int32), boundaries=starts.astype(np.int32))
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
