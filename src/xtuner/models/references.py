"""What a path or name on the command line refers to."""

from __future__ import annotations

import re
from pathlib import Path

from xtuner.hub import fetch

_CHECKPOINT = re.compile(r"iter_(\d+)")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints ``iter_N`` in `folder`, oldest step first."""
    found = [(int(match[1]), path) for path in folder.glob("iter_*")
             if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()]  # fmt: skip
    return [path for _, path in sorted(found)]


def pointer_words(file: Path) -> list[str]:
    """The words of a file that names a checkpoint; one empty word if it is missing or empty. A
    damaged file names a checkpoint that does not exist."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return text.split() or [""]


def checkpoint_of(path: str | Path) -> Path:
    """The folder that `path` refers to, whether or not it exists: the newest checkpoint of a work
    dir, the folder ``x`` of ``x.pth``, the checkpoint that a file `best_checkpoint` names."""
    path = Path(path).expanduser()
    if path.name in ("best_checkpoint", "last_checkpoint") and path.is_file():
        return path.parent / Path(pointer_words(path)[0]).name
    folder = path.with_suffix("") if path.suffix == ".pth" else path
    pointer = folder / "last_checkpoint"
    if pointer.is_file():
        return folder / Path(pointer_words(pointer)[0]).name
    return folder


def same_model(one: str, other: str) -> bool:
    """Whether two names (folders, hub names, fetched models) refer to the same model. A hub name
    that is not on this machine matches any folder of that name:
    ``internlm/internlm2-chat-1_8b`` is ``/models/internlm2-chat-1_8b``."""
    first, second = _folder_of(one), _folder_of(other)
    if first is None or second is None:
        return Path(one).name.lower() == Path(other).name.lower()
    return first.resolve() == second.resolve()


def _folder_of(name: str) -> Path | None:
    folder = checkpoint_of(name)
    return folder if folder.is_dir() else fetch.cached(name)
