"""The optimizer state of DeepSpeed's ZeRO as one entry per parameter, in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.engine.spill import as_it_is
from xtuner.engine.strategies import _state
from xtuner.engine.strategies._deepspeed_groups import Groups
from xtuner.engine.strategies.base import Keep
from xtuner.parallel.processes import Processes


class ZeroState:
    """The state of `zero`, DeepSpeed's optimizer.

    Args:
        zero: A ZeRO optimizer.
        groups: The parameter groups that it was made with.
        stage: Its stage.
        optim_type: The setting, whose state format is kept.
        processes: The process group.
    """

    def __init__(
        self, zero: Any, groups: Groups, *, stage: int, optim_type: str, processes: Processes
    ) -> None:
        self._zero, self._groups, self._stage = zero, groups, stage
        self._optim_type, self._processes = optim_type, processes

    def fp32_parts(self) -> list[Tensor]:
        """The tensors that the optimizer steps on this process."""
        of_stage_3 = self._stage == 3
        name = "fp32_partitioned_groups_flat" if of_stage_3 else "single_partition_of_fp32_groups"
        return list(getattr(self._zero, name))

    def _group_of_part(self, number: int) -> int:
        """The group of a part: stage 3 splits a large group."""
        return int(self._zero.sub_group_to_group_id[number]) if self._stage == 3 else number

    def _values(self) -> dict[int, dict[str, Any]]:
        """The state of one part of each group that has been stepped."""
        found: dict[int, dict[str, Any]] = {}
        for number, part in enumerate(self.fp32_parts()):
            if state := self._zero.optimizer.state.get(part):
                found.setdefault(self._group_of_part(number), state)
        return found

    def gathered(self, keep: Keep = as_it_is) -> dict[str, Any] | None:
        """Gather the full state, one tensor at a time; None outside rank 0. A collective call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        is_main, by_group = self._processes.is_main, self._values()
        entries: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._groups.parameters):
            values: dict[str, Any] = {}
            for name, value in by_group.get(self._groups.index_of(parameter), {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    full = safe_get_full_optimizer_state(parameter, name)
                    values[name] = keep(full.detach().cpu()) if is_main else None
                else:
                    values[name] = _copied(value)
            if is_main and values:
                entries[number] = _state.to_saved(self._optim_type, values)
        if not is_main:
            return None
        return {"state": entries, "param_groups": self._groups.saved(self._zero.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        """Load this process's shards of a full state."""
        _state.check_full_state(self._groups.shapes, state)
        entries = {n: _state.from_saved(self._optim_type, v) for n, v in state["state"].items()}
        examples: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._groups.parameters):
            if number in entries:
                examples.setdefault(self._groups.index_of(parameter), entries[number])
        for number, part in enumerate(self.fp32_parts()):
            if example := examples.get(self._group_of_part(number)):
                self._zero.optimizer.state[part] = {
                    name: torch.zeros_like(part)
                    if isinstance(value, Tensor) and value.ndim
                    else _copied(value, self._device_of_counters(part))
                    for name, value in example.items()
                }
        self._link()
        for number, parameter in enumerate(self._groups.parameters):
            for name, value in entries.get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    self._set(parameter, name, value)

    def _device_of_counters(self, part: Tensor) -> torch.device:
        """Where torch's optimizers keep the step number."""
        options = self._zero.optimizer.param_groups[0]
        on_device = options.get("fused") or options.get("capturable")
        return part.device if on_device else torch.device("cpu")

    def _link(self) -> None:
        """Have DeepSpeed find the state of every parameter: with stages 1 and 2 it looks after the
        step of the first group, when the others have none (0.19.8)."""
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self._processes.device)
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        size = parameter.ds_tensor.numel()
        first = size * self._processes.rank
        part = value.reshape(-1)[first : first + size]
        part = torch.nn.functional.pad(part, (0, size - part.numel()))
        safe_set_local_optimizer_state(parameter, part, name)


def _copied(value: Any, device: torch.device | str = "cpu") -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
