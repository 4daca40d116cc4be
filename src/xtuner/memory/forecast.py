"""Forecasts the memory of a run before it starts.

settings ──footprint──► weights + optimizer + one step at max_length
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from xtuner.config.schema import Settings
from xtuner.device.select import resolve_dtype
from xtuner.engine import strategies
from xtuner.engine.optimizer import optim
from xtuner.engine.strategies import Division
from xtuner.memory.footprint import Footprint, measure
from xtuner.memory.footprint_vision import measure_vision
from xtuner.models.load import cache_key
from xtuner.models.vision.tower import num_image_tokens, vision_config

MB = 2**20

LIBRARIES = 740 * MB
"""Memory of a CPU process without tensors, after everything has been imported and run once."""

ALLOCATOR = {"cpu": 1.05, "cuda": 1.05}
"""Memory that allocators hold per requested byte; the CPU value was measured
(`benchmarks/memory.py`), the GPU value was not."""

UNSHARDED = Division()
"""The shares of a process that holds everything."""

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
        embedding_on_cpu: Whether the input embedding stays in the CPU's memory.
        checkpoint: Size of a checkpoint on disk.
        division: The shares that this process holds.
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
    division: Division = UNSHARDED

    @property
    def peak(self) -> int:
        """Peak memory of the run, without what can move to the CPU."""
        held = self.held_weights + self.gathered + self.step
        held += 0 if self.paged else self.held_optimizer
        held = max(held, self.footprint.weights)  # all of them are loaded before some are moved
        return self.libraries + int(held * ALLOCATOR[self.device])

    @property
    def held_weights(self) -> int:
        """Bytes of weights, and of their float32 copies, on the device of this process."""
        copies = int(4 * self.footprint.trainable * self.division.master)
        on_device = not (self.division.weights_on_cpu and self.device == "cuda")
        copies_on_device = not (self.division.optimizer_on_cpu and self.device == "cuda")
        return on_device * int(self.weights * self.division.weights) + copies_on_device * copies

    @property
    def gathered(self) -> int:
        """Bytes of weights that are gathered at once: the unit that computes, the next one, those
        that are kept, and those that several modules share, such as tied embeddings."""
        division = self.division
        if not (division.gathers or division.weights < 1.0 or division.weights_on_cpu):
            return 0
        parts = self.footprint
        kept = self.division.live * self.weights / max(1, parts.parameters)
        return int(min(self.weights, parts.shared + 2 * parts.unit + kept))

    @property
    def step(self) -> int:
        """Bytes of activations and gradients; of sharded gradients this process's part, those of
        two units, and a bucket."""
        parts, divided = self.footprint, self.division
        bucket = 4 * min(divided.bucket, parts.trainable)
        if divided.gradients == 1.0:
            return parts.step + bucket
        share = parts.gradients / max(1, parts.weights)
        gathered = min(parts.gradients, int(2 * parts.unit * share))
        part = int(parts.gradients * divided.gradients)
        return parts.step - parts.gradients + max(part, gathered) + bucket

    @property
    def held_optimizer(self) -> int:
        """Bytes of optimizer state on the device of this process."""
        if self.division.optimizer_on_cpu and self.device == "cuda":
            return 0
        return int(self.optimizer * self.division.optimizer)

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
        optimizer = f"optimizer {self.held_optimizer / MB:,.0f}"
        inside = "" if self.paged else f"{optimizer}, "
        gathered = f", gathered weights {self.gathered / MB:,.0f}" if self.gathered else ""
        yield (
            f"Memory       {self.peak / MB:,.0f} MiB at the peak "
            f"(weights {self.held_weights / MB:,.0f}{gathered}, {inside}"
            f"{step} and gradients {self.step / MB:,.0f}{rest})"
            + (f"; {optimizer} more, paged: can move to the CPU" if self.paged else "")
        )
        if self.embedding_on_cpu:
            yield (
                f"             the input embedding, {parts.embedding / MB:,.0f} MiB, stays in "
                "CPU memory"
            )


def forecast(
    settings: Settings,
    device: str,
    *,
    recompute: bool,
    paged: bool | None = None,
    processes: int = 1,
    folder: Path = Path(),
) -> Forecast:
    """Forecast the peak memory of one process at `max_length`.

    Args:
        device: 'cpu' or 'cuda'.
        paged: Whether the optimizer state is paged; None: if possible.
        processes: Number of processes that share the model, according to the strategy.

    Raises:
        ModelError: The model's configuration is not available.
    """
    alone = settings.model_copy(update={"strategy": "replicated", "strategy_options": ()})
    models = (alone.pretrained_model_name_or_path, alone.visual_encoder_name_or_path)
    keys = tuple(cache_key(model) for model in models if model)
    found = _footprint(alone, device, recompute, keys)
    division = strategies.division_of(settings, processes, folder=folder)
    moments = _bytes_of_moments(settings.optim_type)
    full = Forecast(
        paged=may_page(settings, device) if paged is None else paged,
        division=division,
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
    named = named and settings.strategy == "replicated"  # a part of the state is AdamW's
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
def _footprint(
    settings: Settings, device: str, recompute: bool, _keys: tuple[tuple[str, int, int], ...]
) -> Footprint:
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
