"""Fully sharded data parallelism (torch's `fully_shard`): every process holds a shard of each
weight, gradient and moment. A layer's weights are gathered before its forward and backward pass and
freed afterwards; its gradients are reduced into the shards after each micro-batch. Values and
dtypes are those of a single process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.engine.spill import as_it_is
from xtuner.engine.strategies import _parts, _state
from xtuner.engine.strategies._sharded import ShardedStrategy
from xtuner.engine.strategies.base import Division, Keep, MakeOptimizer
from xtuner.errors import LaunchError, count

NAME = "fsdp2"


class Strategy(ShardedStrategy):
    """Fully sharded data parallelism."""

    sharded = lockstep = True
    returns_from = 2**20  # the weights and gradients of a layer, several times in each pass
    options: ClassVar[Mapping[str, Any]] = {"cpu_offload": False}

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Refuse quantized weights and optimizers that need full weights."""
        yield from super().check(settings)
        if settings.effective_quantization != "none":
            yield (
                "quantization",
                f"{settings.effective_quantization} weights lose their scales in fully_shard; set "
                f"strategy = 'deepspeed_zero2' (full weights on every process, sharded gradients "
                f"and optimizer state), or tuning = 'lora'",
            )

    @classmethod
    def division(cls, settings: Settings, processes: int) -> Division:
        """A shard of everything, in CPU memory with cpu_offload."""
        part = 1 / processes
        offload = bool(dict(settings.strategy_options).get("cpu_offload", False))
        return Division(
            part, part, part, gathers=True, weights_on_cpu=offload, optimizer_on_cpu=offload
        )

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Shard the weights of `model` unit by unit, and create an optimizer for the shards."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        self.processes.form_group()
        size = self.processes.world_size
        mesh = init_device_mesh(self.processes.device.type, (size,))
        policy = CPUOffloadPolicy() if self.option["cpu_offload"] else OffloadPolicy()
        units = _parts.units_of(model)
        modules: list[Any] = [*units, *([] if model in units else [model])]
        for unit in modules:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if size > 1 and hasattr(unit, "set_reduce_scatter_unused_params"):
                unit.set_reduce_scatter_unused_params(True)
        self.model = model
        self.parameters = optim.trainable(model)
        self.optimizer = make_optimizer(model)
        self._check_active()
        return self.optimizer

    def _check_active(self) -> None:
        from torch.distributed.tensor import DTensor

        unsharded = [n for n, p in self.model.named_parameters() if not isinstance(p, DTensor)]
        if unsharded:
            raise LaunchError(
                f"strategy = {NAME!r} is not active: "
                f"{count(len(unsharded), 'weight is', 'weights are')} not sharded, such as "
                f"{unsharded[0]}; set strategy = 'replicated'"
            )

    def held_weights(self) -> int:
        """Bytes of the shards."""
        parts = [p.to_local() for p in self.model.parameters()]
        return sum(part.nbytes for part in parts)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backpropagate; each unit's gradients are reduced into the shards along the way."""
        if _parts.check_has_gradient(loss, self.processes, NAME):
            loss.backward()  # type: ignore[no-untyped-call]

    def reduce_gradients(self) -> None:
        """Discard gradients of dummy images if no process had an image in the step; all others
        are reduced in the backward pass."""
        if not getattr(self.model, "always_embeds", False) or self._saw_images(self.model):
            return
        for parameter in self.model.embedder.weights():
            parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        found = [p.grad.to_local() for p in self.parameters if p.grad is not None]  # type: ignore[attr-defined]
        return [part for part in found if part.numel()]

    def trained_weights(self, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor | None]]:
        """Gather each trained weight; the main process gets it in CPU memory."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in also:
                full = _gathered(parameter.detach())
                yield name, full.cpu() if self.processes.is_main else None

    def optimizer_state(self, keep: Keep = as_it_is) -> dict[str, Any] | None:
        """Gather the optimizer state, one tensor at a time."""
        held = self.optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for number, values in held["state"].items():
            kept: dict[str, Any] = {}
            for name, value in values.items():
                full = _gathered(value)
                if self.processes.is_main:
                    kept[name] = keep(full.cpu()) if isinstance(full, Tensor) else full
            if self.processes.is_main:
                entries[number] = _state.to_saved(self.settings.optim_type, kept)
        if not self.processes.is_main:
            return None
        return {"state": entries, "param_groups": held["param_groups"]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load this process's shards of a full state."""
        groups = [[p.shape for p in g["params"]] for g in self.optimizer.param_groups]
        _state.check_full_state(groups, state)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        entries = {}
        for number, values in state["state"].items():
            ours = _state.from_saved(self.settings.optim_type, values)
            entries[number] = {n: _part_of(v, parameters[number]) for n, v in ours.items()}
        now = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": now})


def _gathered(value: Any) -> Any:
    """The full tensor of a shard; a collective call."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _part_of(value: Any, parameter: Any) -> Any:
    """The shard of `value` that corresponds to this process's shard of `parameter`."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.ndim == 0:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    local = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(local, mesh, placements, src_data_rank=None)
