"""What a run will take, told before it starts, and what to change when it is too much.

settings ──footprint──► weights + optimizer + one step at max_length ──► fits? ──► cheapest hints
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from xtuner.config.combinations import check_combinations
from xtuner.config.schema import Settings
from xtuner.device.select import resolve_dtype
from xtuner.engine.optimizer import optim
from xtuner.errors import ConfigError, LaunchError, XTunerError
from xtuner.memory.footprint import Footprint, measure
from xtuner.memory.footprint_vision import measure_vision, tokens_each

MB = 2**20

LIBRARIES = 740 * MB
"""What this process holds beside tensors on a CPU once everything is imported and has run once."""

ALLOCATOR = {"cpu": 1.05, "cuda": 1.05}
"""Memory that allocators hold for the memory that is asked of them; the figure for a CPU was
measured (`benchmarks/memory.py`), that for a GPU was not."""

ROOM = 0.9
"""Share of the free memory that a run may plan to use."""

TYPICAL_SAMPLE = 512
"""Length of the samples in packed rows for which attention is forecast."""


@dataclass(frozen=True)
class Forecast:
    """What one process will need, in bytes.

    Attributes:
        footprint: of the model and one step.
        optimizer: state of the optimizer.
        failure: why nothing could be found out; then all counts are 0. Empty otherwise.
        paged: that state lies in memory which a GPU's driver moves to the CPU when it must, and of
            which torch's allocator knows nothing.
        device: 'cpu' or 'cuda'.
        recompute: whether activations are recomputed.
        embedding_on_cpu: whether the input embedding stays in the CPU's memory.
        checkpoint: size of one on disk.
    """

    footprint: Footprint
    optimizer: int
    device: str
    recompute: bool
    checkpoint: int
    embedding_on_cpu: bool = False
    paged: bool = False
    failure: str = ""

    @property
    def peak(self) -> int:
        """Highest memory of the run; without what may move to the CPU."""
        held = self.weights + self.footprint.step
        held += 0 if self.paged else self.optimizer
        held = max(held, self.footprint.weights)  # all of them are loaded before some leave
        return self.libraries + int(held * ALLOCATOR[self.device])

    @property
    def weights(self) -> int:
        """Those that lie on the device."""
        return self.footprint.weights - self.embedding_on_cpu * self.footprint.embedding

    @property
    def libraries(self) -> int:
        """What the process itself holds; a GPU's memory holds nothing of it."""
        return LIBRARIES if self.device == "cpu" else 0

    def lines(self) -> Iterator[str]:
        """Two lines for the terminal; one where nothing could be found out."""
        if self.failure:
            yield f"Memory       not forecast, for the forecast failed: {self.failure}"
            return
        parts = self.footprint
        share = 100 * parts.trainable / max(1, parts.parameters)
        yield (
            f"Parameters   {parts.trainable:,} of {parts.parameters:,} are trained ({share:.2f} %)"
        )
        step = "recomputed activations" if self.recompute else "activations"
        rest = f", libraries {self.libraries / MB:,.0f}" if self.libraries else ""
        optimizer = f"optimizer {self.optimizer / MB:,.0f}"
        inside = "" if self.paged else f"{optimizer}, "
        yield (
            f"Memory       {self.peak / MB:,.0f} MiB at the peak "
            f"(weights {self.weights / MB:,.0f}, {inside}"
            f"{step} and gradients {parts.step / MB:,.0f}{rest})"
            + (f"; {optimizer} more, paged: may move to the CPU" if self.paged else "")
        )
        if self.embedding_on_cpu:
            yield (
                f"             the input embedding, {parts.embedding / MB:,.0f} MiB, stays in the "
                "CPU's memory"
            )


@dataclass(frozen=True)
class MemoryPlan:
    """A forecast beside the memory that is there."""

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
        unknown = bool(self.forecast.failure) and _may_page(self.settings, self.device)
        return self.forecast.paged or unknown

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
            yield f"             more than the {self.memory / MB:,.0f} MiB there are for it"
            yield from self.hints()

    def hints(self) -> Iterator[str]:
        """The cheapest changes that lower the peak, each on top of those before, until it fits."""
        if self.forecast.failure:
            yield "Lower batch_size or max_length, or set gradient_checkpointing = True"
            return
        settings, last, fits = self.settings, self.forecast.peak, False
        yield "Cheapest changes, each on top of those before:"
        for changes in _hints(self.settings, self.forecast):
            tried = settings.model_copy(update=changes)
            if next(check_combinations(tried), None):
                continue  # a run would refuse it
            found = forecast(
                tried,
                self.device,
                recompute=_recomputes(tried, self.forecast),
                paged=_may_page(tried, self.device) and self._would_page(tried),
            )
            if self.forecast.embedding_on_cpu:
                found = _without_embedding(found, tried)
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

    A fault in the forecast is told in its lines and stops nothing, unless $XTUNER_STRICT is set, as
    in our tests.

    Args:
        settings: of the run.
        device: 'cpu' or 'cuda'.
        memory: bytes to plan for; None takes nine tenths of what is free on `device`.
        processes: how many train; on a CPU they share its memory, of GPUs each has its own.

    Raises:
        ModelError: the model's configuration cannot be had.
        LaunchError: `memory` is None and there is no such device.
    """
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
    except XTunerError:
        raise
    except Exception as error:  # a step on shapes alone meets code that never thought of it
        if os.environ.get("XTUNER_STRICT"):
            raise
        first = next(iter(str(error).splitlines()), "")
        nothing = Footprint(0, 0, 0, 0, 0)
        words = f"{type(error).__name__}: {first}"
        return Forecast(nothing, 0, device, wanted is True, checkpoint=0, failure=words)
    return expected


def forecast(
    settings: Settings, device: str, *, recompute: bool, paged: bool | None = None
) -> Forecast:
    """Forecast the peak of one process at `max_length`.

    Args:
        settings: of the run.
        device: 'cpu' or 'cuda'.
        recompute: whether activations are recomputed.
        paged: whether the optimizer's state is paged; None: if it may be.

    Raises:
        ModelError: the model's configuration cannot be had.
    """
    found = _footprint(settings, device, recompute)
    moments = _bytes_of_moments(settings.optim_type)
    whole = Forecast(
        paged=_may_page(settings, device) if paged is None else paged,
        footprint=found,
        optimizer=int(found.trainable * moments),
        device=device,
        recompute=recompute,
        checkpoint=int(found.trainable * (4 + moments)),
    )
    return _without_embedding(whole, settings) if settings.embedding_on_cpu is True else whole


def _ways(settings: Settings, device: str) -> Iterator[Forecast]:
    """Forecasts of what is left to us, by what it costs: an embedding on the CPU some MiB to copy a
    micro-batch; paging what does not fit of the optimizer's state, at most all of it, to copy back
    and forth a step; recomputation a third more time of every micro-batch."""
    wanted, may_page = settings.gradient_checkpointing, _may_page(settings, device)
    pages = (False, True) if may_page and settings.paged_optimizer == "auto" else (may_page,)
    for recompute in (False, True) if wanted == "auto" else (wanted,):
        for paged in pages:
            found = forecast(settings, device, recompute=recompute, paged=paged)
            yield found
            without = _without_embedding(found, settings)
            if settings.embedding_on_cpu == "auto" and without.embedding_on_cpu:
                yield without


def _may_page(settings: Settings, device: str) -> bool:
    """Whether the optimizer's state may be paged."""
    named = device == "cuda" and optim.is_paged(settings.optim_type)
    return named and settings.paged_optimizer is not False


def _without_embedding(whole: Forecast, settings: Settings) -> Forecast:
    """The forecast with the input embedding on the CPU, where it can be and there is a GPU."""
    can = (
        whole.device == "cuda"
        and whole.footprint.embedding > 0
        and settings.can_keep_embedding_on_cpu
    )
    return replace(whole, embedding_on_cpu=can)


@functools.lru_cache(maxsize=16)
def _footprint(settings: Settings, device: str, recompute: bool) -> Footprint:
    dtype, full = resolve_dtype(settings.dtype, device), settings.llm_training == "full"
    mixed = dtype != torch.float32 and (full or bool(settings.lora_modules_to_save))
    lora: dict[str, Any] = {
        "r": settings.lora_r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": settings.lora_target_modules,
        "modules_to_save": settings.lora_modules_to_save,
    }
    image = tokens_each(settings.visual_encoder_name_or_path or "") if settings.has_vision else 0
    whole = settings.max_length + image
    longest = whole
    if settings.packs:
        longest = min(longest, TYPICAL_SAMPLE + image)
    total = settings.batch_size * whole
    lengths = (longest,) * (total // longest) + ((total % longest,) if total % longest else ())
    accumulate = settings.accumulative_counts > 1
    found = measure(
        settings.pretrained_model_name_or_path,
        tokens=lengths,
        dtype=torch.float32 if full else dtype,
        quantization=settings.effective_quantization,
        double_quant=settings.double_quant,
        lora=lora if settings.uses_adapter else None,
        frozen=settings.llm_training == "frozen",
        sees=settings.has_vision,
        recompute=recompute,
        accumulate=accumulate,
        flash=device == "cuda",
        autocast=dtype if mixed else None,
        trust_remote_code=settings.trust_remote_code,
    )
    if not settings.has_vision:
        return found
    embedder = measure_vision(settings, images=len(lengths), width=found.width, dtype=dtype)
    return embedder.beside(found, accumulate=accumulate)


def _bytes_of_moments(optim_type: str) -> float:
    """Bytes of optimizer state a trained number."""
    name = optim_type.lower()
    moments = 0 if name in ("sgd", "adafactor") else 1 if "lion" in name else 2
    return moments * (1.03 if "8bit" in name else 4)


def _recomputes(settings: Settings, before: Forecast) -> bool:
    wanted = settings.gradient_checkpointing
    return before.recompute if wanted == "auto" else wanted


def _hints(settings: Settings, before: Forecast) -> Iterator[Mapping[str, Any]]:
    """Changes in the order of what they cost: time first, then detail, then what is learned."""
    if settings.batch_size > 1:
        counts = settings.accumulative_counts * settings.batch_size
        yield {"batch_size": 1, "accumulative_counts": counts}
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


def free_memory(device: str, processes: int = 1) -> int:
    """Bytes that `processes` like this one could take on `device`, with what they hold already.

    Raises:
        LaunchError: there is no GPU.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LaunchError("there is no GPU here: say how much memory it has, as --memory 8GB")
        return int(torch.cuda.mem_get_info()[0])
    held = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available) + processes * held
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            free = min(free, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return free


def parse_memory(text: str) -> int:
    """Bytes of a size such as '8GB', '7.5 GiB' or '6000MB'; GB and MB count in powers of two, as
    GPUs are sold.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if match is None or not math.isfinite(size := float(match[1])) or size <= 0:
        raise ConfigError(f"--memory {text!r}: is no size; give one such as 8GB, 7.5GB or 6000MB")
    return int(size * (2**30 if match[2].upper() == "G" else 2**20))


def check_disk(work_dir: Path, size: int, *, limit: int) -> str:
    """Compare the size of a checkpoint with the free disk; return a line about it.

    Raises:
        LaunchError: not even one checkpoint fits.
    """
    free = shutil.disk_usage(work_dir).free
    if size > free:
        raise LaunchError(
            f"a checkpoint takes about {size / MB:,.0f} MiB and {work_dir} has {free / MB:,.0f} "
            "MiB free: make room, or choose another place with --work-dir"
        )
    at_once = 2 if limit < 0 else limit + 1
    kept = "all" if limit < 0 else limit
    line = f"Checkpoints  about {size / MB:,.0f} MiB each, {kept} kept; {free / MB:,.0f} MiB free"
    return line + ("; this may not be enough for all of them" if size * at_once > free else "")
