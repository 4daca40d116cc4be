"""Training objectives, one file each; the file name is the value of the setting `algorithm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xtuner import plugins
from xtuner.algorithms.base import BaseAlgorithm
from xtuner.errors import ConfigError, listed

if TYPE_CHECKING:
    from xtuner.config.schema import Settings

SETTING = "algorithm"


def of_run(settings: Settings, *, folder: Path) -> BaseAlgorithm:
    """Create the algorithm of a run.

    Args:
        folder: Where a user's file is looked up first.

    Raises:
        ConfigError: There is no such algorithm, it is not a `BaseAlgorithm`, or it does not support
            these settings.
    """
    kind = _class_of(settings.algorithm, folder)
    if problems := [f"{name}: {problem}" for name, problem in kind.check(settings)]:
        raise ConfigError(
            listed(f"algorithm = {settings.algorithm!r} does not support these settings:", problems)
        )
    return kind(settings)


def _class_of(name: str, folder: Path) -> type[BaseAlgorithm]:
    kind: type[BaseAlgorithm]
    if plugins.is_user_path(name):
        kind = plugins.load_user_class(name, BaseAlgorithm, setting=SETTING, folder=folder)
    else:
        kind = plugins.load(__name__, name, setting=SETTING).Algorithm
    return kind
