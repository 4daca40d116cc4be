"""DeepSpeed's ZeRO (arXiv:1910.02054): optimizer state, gradients and weights are sharded across
processes.

Its engine computes, reduces and steps; the trainer keeps the loss divisor, accumulation, clipping
and the handling of non-finite steps. DeepSpeed averages gradients over processes and may skip
steps: the loss is multiplied by the number of processes, and a step is taken only if the norm is
finite.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.engine.spill import as_it_is
from xtuner.engine.strategies import _parts
from xtuner.engine.strategies._deepspeed_config import OF_SETTINGS, DeepSpeedConfig, built_in
from xtuner.engine.strategies._deepspeed_groups import Groups
from xtuner.engine.strategies._deepspeed_state import ZeroState
from xtuner.engine.strategies._sharded import ShardedStrategy
from xtuner.engine.strategies.base import Division, Keep, MakeOptimizer
from xtuner.errors import ConfigError, LaunchError, brief
from xtuner.parallel.processes import Processes


class DeepSpeedStrategy(ShardedStrategy):
    """ZeRO with one configuration, which subclasses set."""

    config: ClassVar[DeepSpeedConfig]
    returns_from = 16 * 2**20  # flat buffers of all gradients or weights

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Refuse what DeepSpeed cannot shard."""
        yield from super().check(settings)
        if importlib.util.find_spec("deepspeed") is None:
            yield "strategy", "needs DeepSpeed: pip install 'xtuner[deepspeed]'"
        if settings.optim_type == "Adagrad":
            yield (
                "optim_type",
                "DeepSpeed creates 'Adagrad' anew, without its parameter groups and weight decay; "
                "set 'AdamW', or strategy = 'fsdp2'",
            )
        if cls.sharded and settings.effective_quantization == "int8":
            yield (
                "quantization",
                "int8 weights cannot be sharded: ZeRO-3 ignores their scales, which are separate "
                "attributes; set quantization = 'nf4', or strategy = 'deepspeed_zero2'",
            )

    @classmethod
    def division(cls, settings: Settings, processes: int) -> Division:
        """The shares under this ZeRO stage."""
        part, config = 1 / processes, cls.config
        return Division(
            weights=part if config.stage == 3 else 1.0,
            gradients=part if config.stage >= 2 else 1.0,
            optimizer=part,
            master=part,
            gathers=config.stage == 3,
            live=config.live if config.stage == 3 else 0,
            bucket=config.bucket,
            weights_on_cpu=config.weights_on_cpu,
            optimizer_on_cpu=config.optimizer_on_cpu,
        )

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Wrap model and optimizer in DeepSpeed's engine."""
        deepspeed = _deepspeed(self.processes)
        optimizer = make_optimizer(model)
        embedder: Any = getattr(model, "embedder", None)
        images = {id(p) for p in embedder.weights()} if embedder is not None else set()
        self._groups = Groups(optimizer, images)
        self._inner: Any = model
        trained = sum(p.numel() for p in self._groups.parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=self.config.for_engine(self.settings.batch_size, trained=trained),
                dist_init_required=False,
            )
        self.model = self.engine
        self.optimizer = self.zero = self.engine.optimizer
        if self.config.stage == 3:
            _gather_units(model)
        self._state = ZeroState(
            self.zero,
            self._groups,
            stage=self.config.stage,
            optim_type=self.settings.optim_type,
            processes=self.processes,
        )
        self._check_active()
        self._pending = False
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
            held = sum(part.numel() for part in self._state.fp32_parts())
            everything = sum(shape.numel() for group in self._groups.shapes for shape in group)
            padding = 2 * world_size * (len(self._groups.parameters) + 1)
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
            return sum(p.nbytes for p in self._inner.parameters())
        weights: Any = self._inner.parameters()
        held = [part for p in weights for part in (p.data, p.ds_tensor)]
        return sum(part.nbytes for part in held)

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
        """Backpropagate; stages 2 and 3 reduce gradients into this process's shards."""
        alone = not self.lockstep and not loss.requires_grad  # the others do not wait
        if alone or not _parts.check_has_gradient(loss, self.processes, self.config.name):
            return
        self._pending = True
        boundary = last and self.lockstep
        self.engine.set_gradient_accumulation_boundary(boundary)
        self.engine.backward(loss * float(self.processes.world_size), scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        """For stage 1, sum the gradients; a missing gradient counts as zero."""
        if self._groups.split:
            self._groups.step_images = self._saw_images(self._inner)
        if self.lockstep:
            return
        trained = self._groups.parameters
        counts = self.processes.sum([float(p.grad is not None) for p in trained])
        if not any(counts):
            self._pending = False  # the step used no trained weight
            return
        for parameter, count in zip(trained, counts, strict=True):
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
            return [p.grad for p in self._state.fp32_parts() if p.grad is not None]
        groups = self.zero.averaged_gradients.values()
        return [g for group in groups for g in group or () if g is not None and g.numel()]

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

    def trained_weights(self, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor | None]]:
        """Gather each trained weight; the main process gets it in CPU memory."""
        for name, parameter in self._inner.named_parameters():
            if not (parameter.requires_grad or name in also):
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
        return self._state.gathered(keep)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load this process's shards of a full state."""
        self._state.load(state)

    def close(self) -> None:
        """Remove DeepSpeed's hooks, and the model from what DeepSpeed keeps per process."""
        if self.model is not None:
            with contextlib.suppress(Exception):  # after a failed step; that error is reported
                self.engine.destroy()
            _forget(self._inner)
        super().close()


def _gather_units(model: nn.Module) -> None:
    """Have stage 3 gather all weights of a unit before it computes and keep them until it has.

    DeepSpeed gathers a module's weights when the module is called, but fused layers read weights of
    inner modules without calling them. DeepSpeed notices such a read only if the weight is not
    there. Otherwise it may free it before the backward pass, which then reads memory beyond it.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for unit in _parts.units_of(model):
        own = {id(parameter) for parameter in unit.parameters(recurse=False)}
        for parameter in unit.parameters():
            if id(parameter) not in own:
                register_external_parameter(unit, parameter)


def _forget(model: nn.Module) -> None:
    """Remove `model` from two global holders of stage 3: the stack of modules whose forward pass
    runs, which it never leaves, and a cache without limit over the modules of all engines."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # a decorator hides the cache
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def strategy_of(config: DeepSpeedConfig) -> type[DeepSpeedStrategy]:
    """The strategy class with this configuration."""
    sharing = {"sharded": config.stage == 3, "lockstep": config.stage >= 2}
    facts = {"config": config, "__doc__": config.name, **sharing}
    return type("Strategy", (DeepSpeedStrategy,), facts)


def built_in_strategy(name: str) -> type[DeepSpeedStrategy]:
    """The strategy class of this name."""
    return strategy_of(built_in(name.rpartition(".")[2]))


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
            raise ConfigError(
                f"strategy: DeepSpeed cannot be imported: {brief(error)}; set "
                f"strategy = 'fsdp2', which only needs torch"
            ) from error
        # A shared-memory all-reduce that is not used here: compiling it takes minutes.
        __compatible_ops__["deepspeed_shm_comm"] = False
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # DeepSpeed uses deprecated names of torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
