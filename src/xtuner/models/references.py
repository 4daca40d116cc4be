"""What a path or name on the command line refers to."""

from __future__ import annotations

from pathlib import Path

from xtuner.hub import fetch


def checkpoint_of(path: str | Path) -> Path:
    """The folder that `path` refers to, whether or not it exists: the newest checkpoint of a work
    dir, the folder ``x`` of ``x.pth``, the checkpoint that a file `best_checkpoint` names."""
    path = Path(path).expanduser()
    if path.name in ("best_checkpoint", "last_checkpoint") and path.is_file():
        words = path.read_text(encoding="utf-8").split() or [""]
        return path.parent / Path(words[0]).name
    folder = path.with_suffix("") if path.suffix == ".pth" else path
    pointer = folder / "last_checkpoint"
    if pointer.is_file():
        return folder / Path(pointer.read_text(encoding="utf-8").strip()).name
    return folder


def same_model(one: str, other: str) -> bool:
    """Whether two names (folders, hub names, fetched models) refer to the same model."""
    return _resolved(one) == _resolved(other)


def _resolved(name: str) -> str:
    folder = checkpoint_of(name)
    found = folder if folder.is_dir() else fetch.cached(name)
    return str(found.resolve()) if found else name
