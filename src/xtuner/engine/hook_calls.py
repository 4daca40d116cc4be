"""Calls the hooks of a run: collective hooks on every process, the others on the main process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtuner.engine.checked_loss import as_number
from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.errors import ConfigError, DataError, LaunchError, XTunerError
from xtuner.parallel.activity import busy
from xtuner.parallel.processes import Processes


class HookCalls:
    """The hooks of one process, in order.

    Args:
        hooks: The run's hooks; those that are not collective are skipped outside the main process.
        run: The argument of each call.
    """

    def __init__(self, hooks: Sequence[BaseHook], run: Run, processes: Processes) -> None:
        here = [hook for hook in hooks if hook.collective or processes.is_main]
        self.hooks = sorted(here, key=lambda hook: (hook.records, hook.order))
        self._run, self._processes = run, processes

    def call(self, event: str) -> None:
        """Call method `event` of every hook; all processes return or raise together.

        Raises:
            DataError: A hook on any process met a bad row.
            XTunerError: A hook failed otherwise; raised on all processes.
        """
        fault: XTunerError | None = None
        try:
            for hook in self.hooks:
                self._call(hook, event)
        except XTunerError as error:
            fault = error
        (faults,) = self._processes.sum([float(fault is not None)])
        if faults:
            self._raise(fault)

    def _call(self, hook: BaseHook, event: str) -> None:
        name = type(hook).__qualname__
        alone = self._processes.without_others
        with (busy if hook.collective else alone)(f"hook {name}"):
            getattr(hook, event)(self._run)
        for key, value in self._run.scalars.items():
            if type(value) not in (float, int):
                self._run.scalars[key] = _number(value, key, hook)

    def _raise(self, fault: XTunerError | None) -> None:
        """Raise the same type of error on all processes, so that they react alike."""
        messages = [(isinstance(fault, DataError), str(fault))] if fault else []
        messages = self._processes.gather(messages)
        text = "; ".join(dict.fromkeys(words for _, words in messages))
        if all(of_data for of_data, _ in messages):
            raise DataError(text) from fault
        if fault is None or isinstance(fault, DataError):
            raise LaunchError(text) from fault
        raise fault

    def close(self, hook: BaseHook) -> None:
        """Close a hook; its failure must not hide the end of the run or the run's own error."""
        try:
            hook.close()
        except Exception as error:
            self._run.console.print(
                f"Note: {type(hook).__module__} could not finish: {error}", markup=False
            )


def _number(value: Any, name: str, hook: BaseHook) -> float:
    """The number `value` that `hook` assigned to ``run.scalars[name]``, as a float.

    Raises:
        ConfigError: It is not a number.
    """
    if (number := as_number(value)) is None:
        shape = getattr(value, "shape", None)
        seen = f"a {type(value).__name__} of shape {list(shape)}" if shape else f"{value!r}"
        raise ConfigError(
            f"hook {type(hook).__qualname__}: run.scalars[{name!r}] is {seen:.200}; it must be a "
            "number"
        )
    return float(number)
