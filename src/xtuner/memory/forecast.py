"""Forecasts the memory of a run before it starts.

settings ──footprint──► weights + optimizer + one step at max_length
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from xtuner.config.schema import Settings
from xtuner.device.select import resolve_dtype
from xtuner.engine.optimizer import optim
from xtuner.memory.footprint import Footprint, measure
from xtuner.memory.footprint_vision import measure_vision
from xtuner.models.vision.tower import num_image_tokens, vision_config

MB = 2**20

LIBRARIES = 740 * MB
"""Memory of a CPU process without tensors, once everything is imported and has run once."""

ALLOCATOR = {"cpu": 1.05, "cuda": 1.05}
"""Memory that allocators hold per requested byte; the CPU value was measured
(`benchmarks/memory.py`), the GPU value was not."""

TYPICAL_SAMPLE = 512
"""Assumed length of samples in packed rows, for the forecast of attention."""


@dataclass(frozen=True)
class Forecast:
    """The memory that one process will need, in bytes.

    Attributes:
        footprint: Footprint of the model and one step.
        optimizer: Bytes of optimizer state.
        failure: Why the forecast failed; then all counts are 0. Empty otherwise.
        paged: The optimizer state is in memory that the GPU driver moves to the CPU when necessary,
            outside torch's allocator.
        device: 'cpu' or 'cuda'.
        recompute: Whether activations are recomputed.
        embedding_on_cpu: Whether the input embedding stays in CPU memory.
        checkpoint: Size of a checkpoint on disk.
        graphs: Whether the decoder can be recorded as CUDA graphs.
    """

    footprint: Footprint
    optimizer: int
    device: str
    recompute: bool
    checkpoint: int
    embedding_on_cpu: bool = False
    paged: bool = False
    graphs: bool = False
    failure: str = ""

    @property
    def peak(self) -> int:
        """Peak memory of the run, without what can move to the CPU."""
        held = self.weights + self.footprint.step
        held += 0 if self.paged else self.optimizer
        held = max(held, self.footprint.weights)  # all of them are loaded before some are moved
        return self.libraries + int(held * ALLOCATOR[self.device])

    @property
    def weights(self) -> int:
        """The bytes of weights on the device."""
        return self.footprint.weights - self.embedding_on_cpu * self.footprint.embedding

    @property
    def libraries(self) -> int:
        """Memory of the process itself; 0 for a GPU."""
        return LIBRARIES if self.device == "cpu" else 0

    def lines(self) -> Iterator[str]:
        """Two lines for the terminal; one if the forecast failed."""
        if self.failure:
            yield f"Memory unknown, because the forecast failed: {self.failure}"
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
            + (f"; {optimizer} more, paged: can move to the CPU" if self.paged else "")
        )
        if self.embedding_on_cpu:
            yield (
                f"             the input embedding, {parts.embedding / MB:,.0f} MiB, stays in "
                "CPU memory"
            )


def forecast(
    settings: Settings, device: str, *, recompute: bool, paged: bool | None = None
) -> Forecast:
    """Forecast the peak memory of one process at `max_length`.

    Args:
        settings: of the run.
        device: 'cpu' or 'cuda'.
        recompute: Whether activations are recomputed.
        paged: Whether the optimizer state is paged; None: if possible.

    Raises:
        ModelError: The model's configuration is not available.
    """
    found = _footprint(settings, device, recompute)
    moments = _bytes_of_moments(settings.optim_type)
    full = Forecast(
        paged=may_page(settings, device) if paged is None else paged,
        footprint=found,
        optimizer=int(found.trainable * moments),
        device=device,
        recompute=recompute,
        checkpoint=int(found.trainable * (4 + moments)),
        graphs=settings.may_use_graphs(device),
    )
    return without_embedding(full, settings) if settings.embedding_on_cpu is True else full


def may_page(settings: Settings, device: str) -> bool:
    """Whether the optimizer state can be paged."""
    named = device == "cuda" and optim.is_paged(settings.optim_type)
    return named and settings.paged_optimizer is not False


def without_embedding(full: Forecast, settings: Settings) -> Forecast:
    """`full` with the input embedding on the CPU, if that is possible and the device is a GPU."""
    can = (
        full.device == "cuda"
        and full.footprint.embedding > 0
        and settings.can_keep_embedding_on_cpu
    )
    return replace(full, embedding_on_cpu=can)


@functools.lru_cache(maxsize=16)
def _footprint(settings: Settings, device: str, recompute: bool) -> Footprint:
    dtype = resolve_dtype(settings.dtype, device)
    image = 0
    if settings.has_vision:
        image = num_image_tokens(vision_config(settings.visual_encoder_name_or_path or ""))
    row = settings.max_length + image
    longest = min(row, TYPICAL_SAMPLE + image) if settings.packs else row
    total = settings.batch_size * row
    lengths = (longest,) * (total // longest) + ((total % longest,) if total % longest else ())
    llm = measure(settings, tokens=lengths, dtype=dtype, device=device, recompute=recompute)
    if not settings.has_vision:
        return llm
    vision = measure_vision(settings, images=len(lengths), width=llm.width, dtype=dtype)
    return vision.beside(llm, accumulate=settings.keeps_gradients(device))


def _bytes_of_moments(optim_type: str) -> float:
    """Bytes of optimizer state per trained parameter."""
    name = optim_type.lower()
    moments = 0 if name in ("sgd", "adafactor") else 1 if "lion" in name else 2
    return moments * (1.03 if "8bit" in name else 4)
