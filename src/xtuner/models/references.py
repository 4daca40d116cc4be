"""What a path or name on the command line refers to."""

from __future__ import annotations

import re
from pathlib import Path

from xtuner.errors import ModelError, did_you_mean, shell_command
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


def refuse_missing(name: str) -> None:
    """Check, without importing torch, that `name` can be a model: a folder, a fetched model or a
    name on the hub.

    Raises:
        ModelError: It is none of these.
    """
    path = checkpoint_of(name)
    if path.is_dir() or fetch.cached(name) is not None:
        return
    if looks_like_path(name):
        raise ModelError(f"{name}: {contents(Path(name).expanduser())}")
    if "/" not in name:
        guess = did_you_mean(name, [entry.name for entry in Path().iterdir() if entry.is_dir()])
        raise ModelError(
            f"{name}: no such folder, and no fetched model of that name{guess or '.'} "
            f"`{shell_command('xtuner', 'fetch', name)}` fetches a model of the catalog; give "
            "a checkpoint as its folder, such as work_dirs/my_run/iter_100"
        )


def looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a name on the hub, which has one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".pth", "/"))


def contents(path: Path) -> str:
    """Describe what was looked for at `path` and what was found."""
    looked = (
        "looked for config.json (a model), adapter_config.json (an adapter) and last_checkpoint "
        "(a work dir)"
    )
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if folder == path:
        return f"{looked}; the folder contains {shown or 'nothing'}"
    return f"no such folder; {folder.resolve()} contains {shown or 'nothing'}"
