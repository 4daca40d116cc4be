"""Compares a forecast with the device's memory: resolves 'auto' settings, and proposes changes if
the run does not fit.

    settings ──forecast──► fits? ──► cheapest changes that do
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.combinations import check_combinations
from xtuner.config.schema import Settings
from xtuner.engine import strategies
from xtuner.engine.optimizer import optim
from xtuner.errors import XTunerError, in_one_line
from xtuner.memory.available import free_memory
from xtuner.memory.footprint import Footprint
from xtuner.memory.forecast import MB, Forecast, forecast, may_page, without_embedding
from xtuner.models.load import located_config

STRATEGIES = (
    "deepspeed_zero1",
    "deepspeed_zero2",
    "fsdp2",
    "deepspeed_zero3",
    "deepspeed_zero2_offload",
    "deepspeed_zero3_offload",
)
"""Strategies that shard a model, by increasing cost: bytes sent per step, then work on the CPU."""

ROOM = 0.9
"""Share of the free memory that a run plans to use."""


@dataclass(frozen=True)
class MemoryPlan:
    """A forecast and the memory of the device.

    Attributes:
        settings: The run's settings.
        device: 'cpu' or 'cuda'.
        memory: Bytes that one process may use.
        forecast: The forecast for one process.
        processes: Number of processes that train together.
        folder: The folder of the settings file.
    """

    settings: Settings
    device: str
    memory: int
    forecast: Forecast
    processes: int = 1
    folder: Path = Path()

    @property
    def fits(self) -> bool:
        """Whether the peak fits; True if unknown."""
        return bool(self.forecast.failure) or self.forecast.peak <= self.memory

    @property
    def paged(self) -> bool:
        """Whether the optimizer state is paged; if the forecast failed, according to
        `optim_type`."""
        unknown = bool(self.forecast.failure) and may_page(self.settings, self.device)
        return self.forecast.paged or unknown

    @property
    def graphs(self) -> bool:
        """Whether the decoder can be recorded as CUDA graphs, which keep gradients in memory."""
        return self.forecast.graphs or bool(self.forecast.failure)

    @property
    def embedding_on_cpu(self) -> bool:
        """Whether to keep the input embedding in CPU memory; if the user sets it, it is tried even
        if the forecast knows that the model will refuse."""
        asked = self.settings.embedding_on_cpu is True and self.device == "cuda"
        return asked or self.forecast.embedding_on_cpu

    def lines(self) -> Iterator[str]:
        """The forecast and, if it does not fit, what to change."""
        yield from self.forecast.lines()
        name = self.settings.optim_type
        if self.device == "cuda" and optim.is_paged(name) and not self.paged:
            set_by_user = self.settings.paged_optimizer is False
            why = "is not paged (paged_optimizer = False)" if set_by_user else "fits unpaged"
            yield f"             optimizer state {why}: {optim.unpaged(name)} for {name}"
        if not self.fits:
            yield f"             more than the {self.memory / MB:,.0f} MiB available"
            yield from self.hints()

    def hints(self) -> Iterator[str]:
        """The cheapest changes that lower the peak, each in addition to the previous ones, until it
        fits."""
        if self.forecast.failure:
            yield "Lower batch_size or max_length, or set gradient_checkpointing = True"
            return
        settings, last, fits = self.settings, self.forecast.peak, False
        yield "Cheapest changes, each in addition to the previous ones:"
        first = self._strategy_that_fits(settings) if self.processes > 1 else ()
        for changes in (*first, *_hints(self.settings, self.forecast)):
            tried = settings.model_copy(update=changes)
            if next(check_combinations(tried), None) or not self._can_use(tried):
                continue  # a run would reject it
            paged = may_page(tried, self.device) and self._would_page(tried)
            found = self._with(tried, paged=paged)
            if self.forecast.embedding_on_cpu:
                found = without_embedding(found, tried)
            peak = found.peak
            if peak > 0.98 * last:
                continue
            settings, last, fits = tried, peak, peak <= self.memory
            setting = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
            yield f"  {setting}: {peak / MB:,.0f} MiB{', fits' if fits else ''}"
            if fits:
                return
        for changes in self._strategy_that_fits(settings):
            yield f"  strategy = {changes['strategy']!r}: fits"
            return
        yield "  a smaller model: the changes above do not suffice"

    def _strategy_that_fits(self, settings: Settings) -> list[Mapping[str, Any]]:
        """The cheapest strategy with which `settings` fit, if there is one."""
        if settings.strategy != "replicated":
            return []
        for name in STRATEGIES:
            tried = settings.model_copy(update={"strategy": name})
            if not self._can_use(tried):
                continue
            if self._with(tried).peak <= self.memory:
                return [{"strategy": name}]
        return []

    def _with(self, tried: Settings, *, paged: bool | None = None) -> Forecast:
        """The forecast of a run with the settings `tried`; see `forecast`."""
        wanted = tried.gradient_checkpointing
        recompute = self.forecast.recompute if wanted == "auto" else wanted
        return forecast(
            tried,
            self.device,
            recompute=recompute,
            paged=paged,
            processes=self.processes,
            folder=self.folder,
        )

    def _can_use(self, tried: Settings) -> bool:
        return strategies.can_use(tried, folder=self.folder)

    def _would_page(self, tried: Settings) -> bool:
        """Whether a run with the settings `tried` can page its optimizer state."""
        asked = tried.paged_optimizer is True or tried.optim_type != self.settings.optim_type
        return asked or self.forecast.paged


def plan_memory(
    settings: Settings,
    device: str,
    *,
    memory: int | None = None,
    processes: int = 1,
    folder: Path = Path(),
) -> MemoryPlan:
    """Forecast a run on `device`, resolving 'auto': recomputation, the embedding on the CPU. An
    error in the forecast becomes a line of output and does not stop the run, unless $XTUNER_STRICT
    is set, as in the tests.

    Args:
        device: 'cpu' or 'cuda'.
        memory: Bytes to plan for; None uses nine tenths of the free memory of `device`.
        processes: Number of processes; on a CPU they share the memory, on GPUs each has its own.

    Raises:
        ModelError: The model's configuration is not available.
        LaunchError: `memory` is None and there is no such device.
    """
    located_config(
        settings.pretrained_model_name_or_path, trust_remote_code=settings.trust_remote_code
    )
    sharing = processes if device == "cpu" else 1
    room = int(ROOM * free_memory(device, sharing)) if memory is None else memory
    room //= sharing
    estimate = functools.partial(forecast, device=device, processes=processes, folder=folder)
    found = _expected(settings, device, room, estimate)
    return MemoryPlan(settings, device, room, found, processes, folder)


def _expected(
    settings: Settings, device: str, room: int, estimate: Callable[..., Forecast]
) -> Forecast:
    try:
        for expected in _ways(settings, device, estimate):
            if expected.peak <= room:
                break
    except Exception as error:  # model code may not support tensors without values
        if os.environ.get("XTUNER_STRICT"):
            raise
        words = in_one_line(error, plain=(XTunerError,))
        recompute = settings.gradient_checkpointing is True
        return Forecast(Footprint(0, 0, 0, 0, 0), 0, device, recompute, checkpoint=0, failure=words)
    return expected


def _ways(settings: Settings, device: str, estimate: Callable[..., Forecast]) -> Iterator[Forecast]:
    """Forecasts of the options that 'auto' leaves open, by increasing cost. No CUDA graphs: these
    keep gradients during a forward pass. An embedding on the CPU: some MiB to copy per micro-batch.
    Paging: the optimizer state that does not fit is copied back and forth once per step.
    Recomputation: a third more time per micro-batch."""
    wanted, pageable = settings.gradient_checkpointing, may_page(settings, device)
    pages = (False, True) if pageable and settings.paged_optimizer == "auto" else (pageable,)
    for recompute in (False, True) if wanted == "auto" else (wanted,):
        for paged in pages:
            found = estimate(settings, recompute=recompute, paged=paged)
            yield found
            if settings.cuda_graphs == "auto" and found.graphs:
                eager = settings.model_copy(update={"cuda_graphs": False})
                found = estimate(eager, recompute=recompute, paged=paged)
                yield found
            without = without_embedding(found, settings)
            if settings.embedding_on_cpu == "auto" and without.embedding_on_cpu:
                yield without


def _hints(settings: Settings, before: Forecast) -> Iterator[Mapping[str, Any]]:
    """Changes by increasing cost: first time, then precision, then what is learned."""
    if settings.batch_size > 1:
        counts = settings.accumulative_counts
        same = {} if counts == "auto" else {"accumulative_counts": counts * settings.batch_size}
        yield {"batch_size": 1, **same}
    if settings.can_keep_embedding_on_cpu:
        yield {"embedding_on_cpu": True}
    if optim.is_paged(settings.optim_type) and not before.paged and before.device == "cuda":
        yield {"paged_optimizer": True}
    if not before.recompute:
        yield {"gradient_checkpointing": True}
    if "8bit" not in settings.optim_type:
        yield {"optim_type": "PagedAdamW8bit"}
    if settings.effective_quantization == "none":
        if settings.tuning == "full":
            yield {"tuning": "lora"}
        quantised = {"quantization": "auto"} if settings.quantization == "none" else {}
        yield {"tuning": "qlora", **quantised}
    length = settings.max_length
    while length > 512:
        length //= 2
        yield {"max_length": length}
    if settings.lora_r > 16:
        yield {"lora_r": 16}
