"""Cache encoded rows on disk, so that the same rows are encoded once.

The key is a hash of the files' contents, their formats, the template and the tokenizer. Paths,
max_length, packing and seed are not part of it, since they do not affect encoding. A store is
written to a temporary folder and renamed when complete; a damaged one is created again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.cache_dir import cache_dir
from xtuner.data import formats
from xtuner.data.tokenize.store import RowStore, StoreWriter
from xtuner.device.ownership import refuse_others
from xtuner.errors import DataError
from xtuner.local_imports import sources
from xtuner.version import __version__

_LAYOUT = 7
"""Increment it when stores of older versions must no longer be used."""


def cache_root() -> Path:
    """The folder of encoded data sets."""
    return cache_dir() / "datasets"


def own_folder(folder: Path) -> None:
    """Create a folder of the cache that only this user can write to; reject one of another user.

    Raises:
        PermissionError: Another user owns it.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if os.name == "posix" and found.st_uid == os.getuid() and found.st_mode & 0o022:
        folder.chmod(found.st_mode & 0o7755)  # with a umask of 002 the group could write
    refuse_others(folder, use="what they write would be trained on")


def is_ours(folder: Path) -> bool:
    """Whether `own_folder` accepts the folder, which exists."""
    try:
        own_folder(folder)
    except OSError:
        return False
    return True


def key_of(facts: Mapping[str, Any]) -> str:
    """Hash everything that the encoded rows depend on."""
    text = json.dumps({"layout": _LAYOUT, "xtuner": __version__, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_or_make(
    key: str,
    *,
    file_names: Sequence[str],
    units: Sequence[str] = (),
    make: Callable[[StoreWriter], None],
    usable: Callable[[RowStore], bool] = lambda store: True,
) -> RowStore:
    """Open the store `key`; call `make` to write it if it is missing or not `usable`.

    Raises:
        DataError: The cache folder cannot be written.
    """
    root = cache_root()
    try:
        own_folder(root)
        with _locked(root / f"{key}.lock") as exclusive:
            if (root / key).is_dir():
                own_folder(root / key)
            store = _opened(root / key, key, file_names, units)
            if store is not None and not usable(store):
                shutil.rmtree(root / key)
                store = None
            if store is None:
                _make(root / key, make, exclusive=exclusive)
                store = RowStore(root / key, key=key, file_names=file_names, units=units)
            return store
    except PermissionError as error:
        raise DataError(f"the cache of encoded data: {error}") from error
    except OSError as error:
        raise DataError(
            f"cannot write the cache of encoded data, {root}: {error.strerror or error}. "
            "Free some space, or set the environment variable XTUNER_CACHE to another folder"
        ) from error


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of everything that affects tokenization."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # padding and truncation are state of the last call, not part of the tokenizer
        facts = {name: rules[name] for name in rules if name not in ("padding", "truncation")}
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    facts["ends"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def rules_of(name: str, *, folder: Path) -> str:
    """A hash of the source code of the format `name`, with the modules that a user's file imports
    from its folder."""
    digest = hashlib.sha256()
    if plugins.is_user_path(name):
        file = plugins.user_file(name, folder)
        paths = sources(file) if file else []
    else:
        paths = sorted(Path(next(iter(formats.__path__))).glob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _opened(
    folder: Path, key: str, file_names: Sequence[str], units: Sequence[str]
) -> RowStore | None:
    if not folder.exists():
        return None
    try:
        return RowStore(folder, key=key, file_names=file_names, units=units)
    except ValueError:
        shutil.rmtree(folder)
        return None


def _make(folder: Path, make: Callable[[StoreWriter], None], *, exclusive: bool) -> None:
    """Write to a temporary folder next to `folder`, then rename it.

    Without a lock (`exclusive` is False) other processes may do the same; the first to finish wins.
    """
    if exclusive:
        for stale in folder.parent.glob(f"{folder.name}.tmp*"):
            shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir(mode=0o700)
    writer = StoreWriter(temporary)
    try:
        make(writer)
        writer.finish()
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        writer.abort()
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Let one process at a time create a store; the others wait and then open it.

    Yields whether the lock was acquired; some network file systems and Windows have no locks.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
