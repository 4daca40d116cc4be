"""A forecast beside the memory of the device: what 'auto' decides, and what to change if it does
not fit.

    settings ──forecast──► fits? ──► cheapest changes that do
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.config.combinations import check_combinations
from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.errors import XTunerError
from xtuner.memory.available import free_memory
from xtuner.memory.footprint import Footprint
from xtuner.memory.forecast import MB, Forecast, forecast, may_page, without_embedding
from xtuner.models.load import located_config

ROOM = 0.9
"""Share of the free memory that a run may plan to use."""


@dataclass(frozen=True)
class MemoryPlan:
    """A forecast beside the memory of the device."""

    settings: Settings
    device: str
    memory: int
    forecast: Forecast

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the usual room; true where nobody knows."""
        return bool(self.forecast.failure) or self.forecast.peak <= self.memory

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state is paged; where nothing is known, as `optim_type` says."""
        unknown = bool(self.forecast.failure) and may_page(self.settings, self.device)
        return self.forecast.paged or unknown

    @property
    def graphs(self) -> bool:
        """Whether the decoder may be recorded as CUDA graphs, which keep gradients in memory."""
        return self.forecast.graphs or bool(self.forecast.failure)

    @property
    def embedding_on_cpu(self) -> bool:
        """Whether the input embedding is to stay in the CPU's memory; asked for, it is tried even
        where the forecast knows that the model will refuse."""
        asked = self.settings.embedding_on_cpu is True and self.device == "cuda"
        return asked or self.forecast.embedding_on_cpu

    def lines(self) -> Iterator[str]:
        """The forecast and, where it does not fit, what to change."""
        yield from self.forecast.lines()
        name = self.settings.optim_type
        if self.device == "cuda" and optim.is_paged(name) and not self.paged:
            why = "is not to be paged" if self.settings.paged_optimizer is False else "fits unpaged"
            yield f"             the optimizer's state {why}: {optim.unpaged(name)} for {name}"
        if not self.fits:
            yield f"             more than the {self.memory / MB:,.0f} MiB available"
            yield from self.hints()

    def hints(self) -> Iterator[str]:
        """The cheapest changes that lower the peak, each on top of those before, until it fits."""
        if self.forecast.failure:
            yield "Lower batch_size or max_length, or set gradient_checkpointing = True"
            return
        settings, last, fits = self.settings, self.forecast.peak, False
        yield "Cheapest changes, applied one after another:"
        for changes in _hints(self.settings, self.forecast):
            tried = settings.model_copy(update=changes)
            if next(check_combinations(tried), None):
                continue  # a run would refuse it
            found = forecast(
                tried,
                self.device,
                recompute=_recomputes(tried, self.forecast),
                paged=may_page(tried, self.device) and self._would_page(tried),
            )
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
        yield "  a smaller model: nothing above is enough"

    def _would_page(self, tried: Settings) -> bool:
        """Whether a run with the settings `tried`, which may page, is sure to where it must."""
        asked = tried.paged_optimizer is True or tried.optim_type != self.settings.optim_type
        return asked or self.forecast.paged


def plan_memory(
    settings: Settings, device: str, *, memory: int | None = None, processes: int = 1
) -> MemoryPlan:
    """Forecast a run on `device`, with what 'auto' needs: recomputation, the embedding on the CPU.

    An error in the forecast is a line of it and stops nothing, unless $XTUNER_STRICT is set, as in
    our tests.

    Args:
        settings: of the run.
        device: 'cpu' or 'cuda'.
        memory: bytes to plan for; None takes nine tenths of what is free on `device`.
        processes: how many train; on a CPU they share its memory, of GPUs each has its own.

    Raises:
        ModelError: the model's configuration cannot be had.
        LaunchError: `memory` is None and there is no such device.
    """
    located_config(
        settings.pretrained_model_name_or_path, trust_remote_code=settings.trust_remote_code
    )
    sharing = processes if device == "cpu" else 1
    room = int(ROOM * free_memory(device, sharing)) if memory is None else memory
    room //= sharing
    return MemoryPlan(settings, device, room, _expected(settings, device, room))


def _expected(settings: Settings, device: str, room: int) -> Forecast:
    wanted = settings.gradient_checkpointing
    try:
        for expected in _ways(settings, device):
            if expected.peak <= room:
                break
    except Exception as error:  # a step on shapes alone meets code that never thought of it
        if os.environ.get("XTUNER_STRICT"):
            raise
        nothing = Footprint(0, 0, 0, 0, 0)
        told = " ".join(str(error).split())
        words = told if isinstance(error, XTunerError) else f"{type(error).__name__}: {told}"
        return Forecast(nothing, 0, device, wanted is True, checkpoint=0, failure=words)
    return expected


def _ways(settings: Settings, device: str) -> Iterator[Forecast]:
    """Forecasts of what is left to us, by what it costs: no CUDA graphs, which keep gradients
    during a forward pass; an embedding on the CPU some MiB to copy a micro-batch; paging what does
    not fit of the optimizer's state, at most all of it, to copy back and forth a step;
    recomputation a third more time of every micro-batch."""
    wanted, pageable = settings.gradient_checkpointing, may_page(settings, device)
    pages = (False, True) if pageable and settings.paged_optimizer == "auto" else (pageable,)
    for recompute in (False, True) if wanted == "auto" else (wanted,):
        for paged in pages:
            found = forecast(settings, device, recompute=recompute, paged=paged)
            yield found
            if settings.cuda_graphs == "auto" and found.graphs:
                plain = settings.model_copy(update={"cuda_graphs": False})
                found = forecast(plain, device, recompute=recompute, paged=paged)
                yield found
            without = without_embedding(found, settings)
            if settings.embedding_on_cpu == "auto" and without.embedding_on_cpu:
                yield without


def _recomputes(settings: Settings, before: Forecast) -> bool:
    wanted = settings.gradient_checkpointing
    return before.recompute if wanted == "auto" else wanted


def _hints(settings: Settings, before: Forecast) -> Iterator[Mapping[str, Any]]:
    """Changes in the order of what they cost: time first, then detail, then what is learned."""
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
