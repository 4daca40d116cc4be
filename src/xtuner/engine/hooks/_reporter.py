"""The common base of hooks that send scalars to an experiment tracker."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.errors import ConfigError, message_of
from xtuner.hub.sharing import shareable


class Reporter(BaseHook):
    """Sends every step's numbers to the tracker `package`; a tracker that fails does not stop the
    run.

    Attributes:
        package: Name of the Python package, and the value of the setting `report_to`.
        module: The imported package.
    """

    order = 90
    records = True
    package: ClassVar[str]

    def __init__(self) -> None:
        self.module: Any = None
        self._open = self._failed = False

    def wanted(self, run: Run) -> bool:
        """Whether `report_to` names the tracker."""
        return self.package in run.settings.report_to

    def on_start(self, run: Run) -> None:
        """Open the run in the tracker.

        Raises:
            ConfigError: The package is not installed or cannot be imported.
        """
        try:
            self.module = importlib.import_module(self.package)
        except Exception as error:  # packages of other versions raise many types
            raise ConfigError(
                f"report_to = {self.package!r}: the package {self.package} cannot be imported "
                f"({message_of(error)}): pip install 'xtuner[{self.package}]'"
            ) from error
        config = shareable(run.settings.model_dump(mode="json"))
        self._try(run, "open the run", lambda: self.open(run, config))
        self._open = not self._failed
        self.on_step(run)

    def on_step(self, run: Run) -> None:
        """Send the step's numbers."""
        values = {name: float(value) for name, value in run.scalars.items()}
        if values:
            self._try(run, "log", lambda: self.log(values, run.step))

    def on_end(self, run: Run) -> None:
        """Send the validation loss of the finished model."""
        if "val_loss" in run.scalars:
            values = {"val_loss": float(run.scalars["val_loss"])}
            self._try(run, "log", lambda: self.log(values, run.step))

    def close(self) -> None:
        """Close the run in the tracker, also after it failed to log."""
        if not self._open:
            return
        try:
            self.finish()
        except Exception:
            if not self._failed:
                raise

    def open(self, run: Run, config: Mapping[str, Any]) -> None:
        """Open the run; `config` holds its settings."""
        raise NotImplementedError

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers."""
        self.module.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        """Close the run."""
        self.module.finish()

    def _try(self, run: Run, what: str, act: Any) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:  # a network failure must not stop the run
            self._failed = True
            run.console.print(
                f"Note: {self.package} could not {what}; it receives no more numbers from this "
                f"run: {message_of(error).rstrip('.')}. They are in scalars.jsonl.",
                markup=False,
            )
