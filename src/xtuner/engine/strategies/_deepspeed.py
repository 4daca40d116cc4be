"""DeepSpeed's ZeRO (arXiv:1910.02054): optimizer state, gradients and weights are sharded across
processes.

Its engine computes, reduces and steps; the trainer keeps the loss divisor, accumulation, clipping
and the handling of non-finite steps. DeepSpeed averages gradients over processes and may skip
steps: the loss is multiplied by the number of processes, and a step is taken only if the norm is
finite.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.engine.spill import as_it_is
from xtuner.engine.strategies import _parts, _state
from xtuner.engine.strategies._deepspeed_config import OF_SETTINGS, DeepSpeedConfig, built_in
from xtuner.engine.strategies.base import BaseStrategy, Division, Keep, MakeOptimizer
from xtuner.errors import ConfigError, LaunchError
from xtuner.parallel.processes import Processes


class DeepSpeedStrategy(BaseStrategy):
    """ZeRO with one configuration, which subclasses set."""

    gathers = True
    config: ClassVar[DeepSpeedConfig]

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Refuse what DeepSpeed cannot shard."""
        yield from super().check(settings)
        yield from _state.check_optimizer(settings.optim_type)
        if importlib.util.find_spec("deepspeed") is None:
            yield "strategy", "needs DeepSpeed: pip install 'xtuner[deepspeed]'"
        if cls.sharded and settings.effective_quantization == "int8":
            yield (
                "quantization",
                "int8 weights cannot be sharded: ZeRO-3 ignores their scales, which are separate "
                "attributes; set quantization = 'nf4', or strategy = 'deepspeed_zero2'",
            )

    @classmethod
    def division(cls, settings: Settings, processes: int) -> Division:
        """What the stage divides."""
        part, config = 1 / processes, cls.config
        return Division(
            weights=part if config.stage == 3 else 1.0,
            gradients=part if config.stage >= 2 else 1.0,
            optimizer=part,
            master=part,
            live=config.live if config.stage == 3 else 0,
            bucket=config.bucket,
            weights_on_cpu=config.weights_on_cpu,
            optimizer_on_cpu=config.optimizer_on_cpu,
        )

    def optimizer_for(self, optim_type: str) -> str:
        """Torch's, where `optim_type` needs whole weights."""
        name = _state.substitute(optim_type) or optim_type
        if name != optim_type:
            self.notes.append(f"{name} takes the place of {optim_type}: its state is divided")
        return name

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Wrap model and optimizer in DeepSpeed's engine."""
        deepspeed = _deepspeed(self.processes)
        optimizer = make_optimizer(model)
        self._groups = _state.full_groups(optimizer)
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
        self._inner = model
        trained = sum(p.numel() for p in self._trained)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=self.config.for_engine(self.settings.batch_size, trained=trained),
                dist_init_required=False,
            )
        self.model = self.engine
        self.zero: Any = self.engine.optimizer
        self._check_active()
        self._pending = False
        if getattr(model, "embedder", None) is not None:
            self.notes.append(
                "DeepSpeed steps over all weights in every step: those for images take a gradient "
                "of zero in a step without images, where 'replicated' and 'fsdp2' leave them alone"
            )
        for key in self.config.decided:
            self.notes.append(
                f"{key} of {self.config.name} is not used: {OF_SETTINGS[key]} in the settings are "
                f"used instead"
            )
        return self.zero.optimizer

    def _check_active(self) -> None:
        """Raise LaunchError unless the engine runs the requested ZeRO stage."""
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        stage, world_size = self.config.stage, self.processes.world_size
        active = isinstance(self.zero, ZeROOptimizer)
        active = active and int(self.engine.zero_optimization_stage()) == stage
        if active:
            held = sum(part.numel() for part in self._fp32_parts())
            everything = sum(shape.numel() for group in self._shapes for shape in group)
            padding = 2 * world_size * (len(self._trained) + 1)
            active = held <= everything / world_size + padding
        if active and stage == 3:
            active = all(hasattr(p, "ds_tensor") for p in self._inner.parameters())
        if not active:
            raise LaunchError(
                f"strategy = {self.config.name!r} is not active: DeepSpeed runs with "
                f"{type(self.zero).__name__} instead of ZeRO stage {stage}; update DeepSpeed, or "
                "set strategy = 'replicated'"
            )

    def held_weights(self) -> int:
        """Bytes of the shards, and of small weights that DeepSpeed does not shard."""
        if self.config.stage < 3:
            return sum(p.numel() * p.element_size() for p in self._inner.parameters())
        weights: Any = self._inner.parameters()
        held = [part for p in weights for part in (p.data, p.ds_tensor)]
        return sum(part.numel() * part.element_size() for part in held)

    def _fp32_parts(self) -> list[Tensor]:
        """The tensors that the optimizer steps on this process."""
        of_stage_3 = self.config.stage == 3
        name = "fp32_partitioned_groups_flat" if of_stage_3 else "single_partition_of_fp32_groups"
        return list(getattr(self.zero, name))

    def zero_grad(self) -> None:
        """Discard all gradients, including accumulated ones."""
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        if not self._pending:
            return
        self._pending = False
        if self.config.stage == 3:
            zero.averaged_gradients = {}
        else:
            zero.micro_step_id = -1
            for number in zero.averaged_gradients:
                zero.averaged_gradients[number] = None
                zero.all_grad_tensors[number] = None
        if self.config.optimizer_on_cpu:
            zero.reset_cpu_buffers()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backpropagate; with stages 2 and 3 gradients are summed into this process's parts."""
        alone = not self.lockstep and not loss.requires_grad  # the others do not wait
        if alone or not _parts.check_has_gradient(loss, self.processes, self.config.name):
            return
        self._pending = True
        boundary = last and self.lockstep
        self.engine.set_gradient_accumulation_boundary(boundary)
        self.engine.backward(loss * float(self.processes.world_size), scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        """For stage 1, sum the gradients; a missing gradient counts as zero."""
        if self.lockstep:
            return
        counts = self.processes.sum([float(p.grad is not None) for p in self._trained])
        if not any(counts):
            self._pending = False  # nothing that is trained took part in the step
            return
        for parameter, count in zip(self._trained, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._pending = True
        if not self.zero.ready_for_gradients:
            self.zero.setup_buckets()
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()

    def _gradients(self) -> list[Tensor]:
        """The gradients of this process's shards."""
        if self.config.optimizer_on_cpu:
            return [p.grad for p in self._fp32_parts() if p.grad is not None]
        groups = self.zero.averaged_gradients.values()
        return [g for group in groups for g in group or () if g is not None and g.numel()]

    def unscale(self, factor: float) -> None:
        """Multiply the gradients of this process's shards."""
        if parts := self._gradients():
            torch._foreach_mul_(parts, factor)

    def clip_gradients(self, max_norm: float | None) -> float:
        """Clip by the global norm over the shards of all processes."""
        parts = self._gradients()
        norm = _parts.norm_of_parts(parts, self.processes)
        _parts.scale_to(parts, max_norm, norm)
        return norm

    def step(self) -> None:
        """Step this process's shards; stages 1 and 2 then gather the new weights."""
        if not self._pending:
            return
        self._pending = False
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        if self.zero.overflow:
            raise LaunchError(
                "DeepSpeed skipped a step with finite gradients; please report this with the "
                "run's settings"
            )

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all parameter groups."""
        optim.set_learning_rate(self.zero, lr)

    def trained_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Gather each trained weight; the main process gets it in CPU memory."""
        for name, parameter in self._inner.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.config.stage < 3:
                yield name, parameter.detach() if self.processes.is_main else None
                continue
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                is_main = self.processes.is_main
                full = parameter.detach().to("cpu", copy=True) if is_main else None
            yield name, full

    def optimizer_state(self, keep: Keep = as_it_is) -> dict[str, Any] | None:
        """Gather the optimizer state, one tensor at a time."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.zero.optimizer
        self._link_state()
        flat = next((p for p in self._fp32_parts() if inner.state.get(p)), None)
        names = list(inner.state[flat]) if flat is not None else []
        entries: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._trained if names else ()):
            values: dict[str, Any] = {}
            for name in names:
                value = inner.state[flat][name]
                if isinstance(value, Tensor) and value.ndim:
                    full = safe_get_full_optimizer_state(parameter, name)
                    value = keep(full.detach().cpu()) if self.processes.is_main else None
                elif isinstance(value, Tensor):
                    value = value.detach().to("cpu", copy=True)
                values[name] = value
            if self.processes.is_main:
                entries[number] = _state.to_saved(self.settings.optim_type, values)
        if not self.processes.is_main:
            return None
        options = zip(self._groups, inner.param_groups, strict=True)
        groups = [{**now, "params": group["params"]} for group, now in options]
        return {"state": entries, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load this process's shards of a full state."""
        _state.check_full_state(self._shapes, state)
        kind = self.settings.optim_type
        entries = {n: _state.from_saved(kind, v) for n, v in state["state"].items()}
        if not entries:
            return
        inner, example = self.zero.optimizer, next(iter(entries.values()))
        for part in self._fp32_parts():
            inner.state[part] = {
                name: torch.zeros_like(part)
                if isinstance(value, Tensor) and value.ndim
                else _copied(value)
                for name, value in example.items()
            }
        self._link_state()
        for number, parameter in enumerate(self._trained):
            for name, value in entries.get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    self._set_state(parameter, name, value)

    def _link_state(self) -> None:
        """Have DeepSpeed find the state of every parameter: with stages 1 and 2 it looks after the
        step of the first group, when the others have none (0.19.8)."""
        if self.config.stage < 3 and all(
            self.zero.optimizer.state.get(p) for p in self._fp32_parts()
        ):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set_state(self, parameter: Any, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self.processes.device)
        if self.config.stage < 3:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        size = parameter.ds_tensor.numel()
        first = size * self.processes.rank
        part = value.reshape(-1)[first : first + size]
        part = torch.nn.functional.pad(part, (0, size - part.numel()))
        safe_set_local_optimizer_state(parameter, part, name)


def strategy_of(config: DeepSpeedConfig) -> type[DeepSpeedStrategy]:
    """The strategy class with this configuration."""
    sharing = {"sharded": config.stage == 3, "lockstep": config.stage >= 2}
    facts = {"config": config, "__doc__": config.name, **sharing}
    return type("Strategy", (DeepSpeedStrategy,), facts)


def built_in_strategy(name: str) -> type[DeepSpeedStrategy]:
    """The strategy class of this name."""
    return strategy_of(built_in(name.rpartition(".")[2]))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _deepspeed(processes: Processes) -> Any:
    """Import DeepSpeed and let it use the existing process group."""
    processes.form_group()
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import deepspeed
            from deepspeed.ops import __compatible_ops__
        except Exception as error:  # it searches for compilers and drivers on import
            first = next(iter(str(error).splitlines()), "")
            raise ConfigError(
                f"strategy: DeepSpeed cannot be imported: {type(error).__name__}: {first}; set "
                f"strategy = 'fsdp2', which only needs torch"
            ) from error
        # A shared-memory all-reduce that is not used here: compiling it takes minutes.
        __compatible_ops__["deepspeed_shm_comm"] = False
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # DeepSpeed uses deprecated names of torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
