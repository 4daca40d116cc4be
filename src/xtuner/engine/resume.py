"""Which settings a resumed run must share with the run that wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.models.run_info import RunInfo


def identity_of(settings: Settings, dataset: str, *, processes: int, dtype: str) -> dict[str, Any]:
    """What a resumed run should share.

    Args:
        settings: of the run.
        dataset: fingerprint of the training data.
        processes: how many take part.
        dtype: of the computation: what 'auto' is on this machine.
    """
    names = (*Settings.on_resume("fixed"), *Settings.on_resume("noted"))
    values = {name: _plain(getattr(settings, name)) for name in names}
    return {**values, "dtype": dtype, "dataset": dataset, "num_processes": processes}


def check_shape(source: Path, settings: Settings) -> None:
    """Refuse the checkpoint `source` if its weights were made by other settings.

    Raises:
        CheckpointError: names each of them.
    """
    info = RunInfo.read(source)
    before = dict(info.settings) if info else {}
    wrong = [
        f"{name}: {before[name]!r} then, {now!r} now"
        for name in Settings.on_resume("fixed")
        if name in before and _plain(before[name]) != (now := _plain(getattr(settings, name)))
    ]
    if wrong:
        raise CheckpointError(
            f"cannot resume from {source}: its weights were made by other settings: "
            f"{'; '.join(wrong)}. Set them back, or train anew with --work-dir DIR"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
