"""Settings that a resumed run must share with the run that wrote the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.config import recipe
from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.models.run_info import RunInfo

DATA = "data"
"""Key of the training data's fingerprint in an identity. Checkpoints written before 2026-11-28 use
another key for an older kind of fingerprint, which cannot be compared."""


def identity_of(settings: Settings, dataset: str, *, processes: int, dtype: str) -> dict[str, Any]:
    """The values that a resumed run should share.

    Args:
        dataset: Fingerprint of the training data.
        dtype: The dtype of the computation, which resolves 'auto' on this machine.
    """
    values = {name: _plain(getattr(settings, name)) for name in _compared(type(settings))}
    return {**values, "dtype": dtype, DATA: dataset, "num_processes": processes}


def completed(identity: Mapping[str, Any], kind: type[Settings] = Settings) -> dict[str, Any]:
    """A checkpoint's `identity`, with defaults for settings that did not exist when it was written:
    they describe what that version did."""
    fields = kind.model_fields
    known = {n: fields[n].default for n in _compared(kind) if not fields[n].is_required()}
    known |= recipe.full_packs(identity)
    return {**{name: _plain(value) for name, value in known.items()}, **identity}


def _compared(kind: type[Settings]) -> tuple[str, ...]:
    return (*kind.on_resume("fixed"), *kind.on_resume("noted"))


def check_shape(source: Path, settings: Settings) -> None:
    """Refuse checkpoint `source` if its weights were trained with other settings.

    Raises:
        CheckpointError: Lists the settings that differ.
    """
    info = RunInfo.read(source)
    before = dict(info.settings) if info else {}
    base = info.base_model if info else ""  # a folder is an absolute path
    wrong = [
        f"{name}: {before[name]!r} then, {now!r} now"
        for name in type(settings).on_resume("fixed")
        if name in before
        and not same(_plain(before[name]), now := _plain(getattr(settings, name)))
        and not (name == "pretrained_model_name_or_path" and _same_folder(base, now))
    ]
    if wrong:
        them = "it" if len(wrong) == 1 else "them"
        raise CheckpointError(
            f"cannot resume from {source}: its weights were trained with other settings: "
            f"{'; '.join(wrong)}. Restore {them}, or start a new run with --work-dir DIR"
        )


def same(before: Any, now: Any, *, of_names: bool = False) -> bool:
    """Whether two values are the same; the settings that a run wrote name copies of the user's
    files.

    Args:
        before: The value of the checkpoint.
        now: The value of this run.
        of_names: An absolute path is the same as a relative one with which it ends.
    """
    if before == now:
        return True
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(
            same(one, other, of_names=of_names) for one, other in zip(before, now, strict=True)
        )
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if plugins.is_user_path(before) and plugins.is_user_path(now):
        return Path(before).name == Path(now).name
    ending = Path(now).parts[-len(Path(before).parts) :]
    return of_names and os.path.isabs(now) and ending == Path(before).parts


def _same_folder(before: str, now: str) -> bool:
    return Path(before).is_dir() and os.path.realpath(before) == os.path.realpath(now)


def _plain(value: Any) -> Any:
    """`value` after a round trip through YAML."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
