"""How weights, gradients and optimizer state are distributed over processes. One file per strategy;
its name is the value of the setting `strategy`."""

from __future__ import annotations

from pathlib import Path

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.engine.strategies._parts import units_of
from xtuner.engine.strategies.base import BaseStrategy, Division
from xtuner.errors import ConfigError, listed
from xtuner.parallel.processes import Processes

__all__ = ["BaseStrategy", "Division", "can_use", "check", "division_of", "of_run", "units_of"]

SETTING = "strategy"


def of_run(settings: Settings, processes: Processes, *, folder: Path) -> BaseStrategy:
    """Create the strategy that `settings` select.

    Args:
        settings: The run's settings.
        processes: The process group.
        folder: The folder in which a user's file is looked up first.

    Raises:
        ConfigError: The strategy does not exist, is not a `BaseStrategy`, or does not support these
            settings.
    """
    return check(settings, folder=folder)(settings, processes)


def check(settings: Settings, *, folder: Path) -> type[BaseStrategy]:
    """The class of the strategy that `settings` name.

    Raises:
        ConfigError: See `of_run`.
    """
    kind = _class_of(settings.strategy, folder)
    if problems := [f"{name}: {problem}" for name, problem in kind.check(settings)]:
        raise ConfigError(listed(f"{SETTING} = {settings.strategy!r} cannot be used:", problems))
    return kind


def division_of(settings: Settings, processes: int, *, folder: Path) -> Division:
    """What each of `processes` processes holds under the strategy that `settings` name; everything
    if it cannot be found."""
    try:
        return _class_of(settings.strategy, folder).division(settings, processes)
    except ConfigError:
        return Division()


def can_use(settings: Settings, *, folder: Path) -> bool:
    """Whether the strategy that `settings` name works with them."""
    return next(_class_of(settings.strategy, folder).check(settings), None) is None


def _class_of(name: str, folder: Path) -> type[BaseStrategy]:
    kind: type[BaseStrategy]
    if name.endswith(".json"):
        from xtuner.engine.strategies._deepspeed import strategy_of
        from xtuner.engine.strategies._deepspeed_config import read

        kind = strategy_of(read(name, folder=folder))
    elif plugins.is_user_path(name):
        kind = plugins.load_user_class(name, BaseStrategy, setting=SETTING, folder=folder)
    else:
        kind = plugins.load(__name__, name, setting=SETTING).Strategy
    return kind
