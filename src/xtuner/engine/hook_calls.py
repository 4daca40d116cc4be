"""Calls the hooks of a run: collective ones on every process, the others on the main one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.errors import DataError, LaunchError, XTunerError
from xtuner.parallel.processes import Processes


class HookCalls:
    """The hooks of one process, in their order.

    Args:
        hooks: of the run; those that are not collective are left out of all processes but the main
            one.
        run: given to each of them.
        processes: this process and the others.
    """

    def __init__(self, hooks: Sequence[BaseHook], run: Run, processes: Processes) -> None:
        here = [hook for hook in hooks if hook.collective or processes.is_main]
        self.hooks = sorted(here, key=lambda hook: (hook.records, hook.order))
        self._run, self._processes = run, processes

    def call(self, event: str) -> None:
        """Call method `event` of every hook; all processes leave it together.

        Raises:
            DataError: a hook of any process met a bad row.
            XTunerError: another fault in a hook; on all processes.
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
        alone = nullcontext() if hook.collective else self._processes.without_others(f"hook {name}")
        with alone:
            getattr(hook, event)(self._run)

    def _raise(self, fault: XTunerError | None) -> None:
        """Raise one kind of error on all processes, so that what they do then is the same."""
        told = [(isinstance(fault, DataError), str(fault))] if fault else []
        told = self._processes.gather(told)
        text = "; ".join(dict.fromkeys(words for _, words in told))
        if all(of_data for of_data, _ in told):
            raise DataError(text) from fault
        if fault is None or isinstance(fault, DataError):
            raise LaunchError(text) from fault
        raise fault

    def close(self, hook: BaseHook) -> None:
        """Close a hook; a fault in it must hide neither the end of the run nor its error."""
        try:
            hook.close()
        except Exception as error:
            self._run.console.print(
                f"Note: {type(hook).__module__} could not finish: {error}", markup=False
            )
