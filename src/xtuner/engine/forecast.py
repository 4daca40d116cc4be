"""What a run will take, told before it starts: memory, disk, steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.errors import LaunchError
from xtuner.models.adapters import count_parameters
from xtuner.models.loss import LOGITS_BYTES

MB = 2**20


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes."""

    weights: int
    training_state: int
    activations: int
    checkpoint: int
    trainable: int
    parameters: int

    @property
    def memory(self) -> int:
        """Expected peak, without what the libraries themselves hold."""
        return self.weights + self.training_state + self.activations + LOGITS_BYTES * 2

    def lines(self) -> Iterator[str]:
        """Two lines for the terminal."""
        share = 100 * self.trainable / max(1, self.parameters)
        yield f"Parameters   {self.trainable:,} of {self.parameters:,} are trained ({share:.2f} %)"
        yield (
            f"Memory       about {self.memory / MB:,.0f} MiB (weights {self.weights / MB:,.0f}, "
            "gradients and optimizer "
            f"{self.training_state / MB:,.0f}, activations {self.activations / MB:,.0f}) beside "
            "the libraries"
        )


def forecast(model: Any, settings: Settings, *, recompute: bool) -> Forecast:
    """Estimate memory and checkpoint size for `model` (transformers or PEFT), from its shapes.

    Activations follow from the widths of the layers: what each linear layer, norm and product keeps
    for the backward pass, or one hidden state a layer when activations are recomputed.
    """
    trainable, parameters = count_parameters(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bytes_each = 2 if "8bit" in settings.optim_type else 8
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", 0)
    layers = getattr(config, "num_hidden_layers", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    tokens = settings.batch_size * settings.max_length
    element = 2 if settings.dtype != "float32" else 4
    kept = (16 * width + 5 * inner) * element
    activations = tokens * (layers * width * element + kept if recompute else layers * kept)
    return Forecast(
        weights=weights,
        training_state=trainable * (4 + bytes_each),
        activations=activations,
        checkpoint=trainable * (4 + bytes_each),
        trainable=trainable,
        parameters=parameters,
    )


def check_disk(work_dir: Path, expected: Forecast, *, limit: int) -> str:
    """Compare the size of a checkpoint with the free disk; return a line about it.

    Raises:
        LaunchError: not even one checkpoint fits.
    """
    free = shutil.disk_usage(work_dir).free
    size = expected.checkpoint
    if size > free:
        raise LaunchError(
            f"a checkpoint takes about {size / MB:,.0f} MiB and {work_dir} has {free / MB:,.0f} "
            "MiB free: "
            "make room, or choose another place with --work-dir"
        )
    at_once = 2 if limit < 0 else limit + 1
    kept = "all" if limit < 0 else limit
    line = f"Checkpoints  about {size / MB:,.0f} MiB each, {kept} kept; {free / MB:,.0f} MiB free"
    return line + ("; this may not be enough for all of them" if size * at_once > free else "")
