"""A DeepSpeed configuration: a built-in one or a user's file, without the keys that the run's
settings replace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.errors import ConfigError

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "deepspeed_zero1": {"stage": 1},
    "deepspeed_zero2": {"stage": 2},
    "deepspeed_zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "deepspeed_zero3": {"stage": 3},
    "deepspeed_zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
"""The section zero_optimization of each built-in strategy."""

OF_SETTINGS: Mapping[str, str] = {
    "train_batch_size": "batch_size, accumulative_counts and the number of processes",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulative_counts",
    "gradient_clipping": "max_norm",
    "optimizer": "optim_type, lr, betas and weight_decay",
    "scheduler": "lr_schedule and the warm-up",
    "fp16": "dtype",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "amp": "dtype",
    "torch_autocast": "dtype",
    "steps_per_print": "logging_steps",
    "sequence_parallel_size": "sequence_parallel_size",
}
"""Keys of a DeepSpeed file that settings replace, and these settings."""

BUCKET = 50_000_000
"""Gradients summed at once; DeepSpeed's default of 500 million takes 2 GB of memory."""
LIVE = 300_000_000
"""Gathered weights that stage 3 keeps; DeepSpeed's default is a billion."""

_REFUSED = {
    "zero_quantized_weights": "rounds weights to 8 bits in each forward pass",
    "zero_quantized_gradients": "rounds gradients to 4 bits",
    "zero_quantized_nontrainable_weights": "rounds frozen weights to 8 bits",
}
"""Keys of zero_optimization that change the arithmetic."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The parts of a configuration that are used.

    Attributes:
        name: Name of the strategy or the file.
        zero: The section zero_optimization, without 'auto'.
        others: Other keys, passed on.
        decided: Keys that are not used because settings replace them.
    """

    name: str
    zero: Mapping[str, Any]
    others: Mapping[str, Any]
    decided: tuple[str, ...] = ()

    @property
    def stage(self) -> int:
        """1 shards the optimizer state, 2 also the gradients, 3 also the weights."""
        return int(self.zero["stage"])

    @property
    def optimizer_on_cpu(self) -> bool:
        """Whether the optimizer state is in CPU memory."""
        return _device(self.zero, "offload_optimizer") != "none"

    @property
    def weights_on_cpu(self) -> bool:
        """Whether the weights are in CPU memory."""
        return _device(self.zero, "offload_param") != "none"

    @property
    def bucket(self) -> int:
        """Numbers in a bucket of gradients, at most."""
        return int(self.zero.get("reduce_bucket_size", BUCKET))

    @property
    def live(self) -> int:
        """Gathered weights that stage 3 keeps."""
        return int(self.zero.get("stage3_max_live_parameters", LIVE))

    def for_engine(self, batch_size: int, *, trained: int) -> dict[str, Any]:
        """The configuration for `deepspeed.initialize`; accumulation, loss scaling, clipping and
        the schedule are the trainer's.

        Args:
            batch_size: Samples or packs per micro-batch.
            trained: Number of trained elements, the maximum bucket size.
        """
        sizes: dict[str, Any] = {"reduce_bucket_size": max(1, min(BUCKET, trained))}
        if self.stage == 3:
            sizes |= {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
        return {
            **self.others,
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "zero_optimization": {**sizes, **self.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }


def built_in(name: str) -> DeepSpeedConfig:
    """The configuration of strategy `name`."""
    return DeepSpeedConfig(name, BUILT_IN[name], {})


def read(name: str, *, folder: Path) -> DeepSpeedConfig:
    """Read the file `name` from `folder` or the working directory. Values 'auto', which
    transformers would fill in, become DeepSpeed's defaults.

    Raises:
        ConfigError: The file does not exist, is not JSON, or cannot be used.
    """
    candidates = [folder / Path(name).expanduser(), Path(name).expanduser()]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    setting = f"strategy = {name!r}"
    if path is None:
        looked = ", ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
        raise ConfigError(f"{setting}: no such file (looked for {looked})")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{setting}: {path} is not JSON: {error}") from error
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(
            f"{setting}: {path} has no section zero_optimization with stage 1, 2 or 3; to train "
            f"without ZeRO, set strategy = 'replicated'"
        )
    if wrong := [f"{key} {why}" for key, why in _REFUSED.items() if zero.get(key) is True]:
        raise ConfigError(f"{setting}: zero_optimization in {path}: {'; '.join(wrong)}; remove it")
    if zero["stage"] == 1 and _device(zero, "offload_optimizer") != "none":
        raise ConfigError(
            f"{setting}: {path} offloads the optimizer state with stage 1; set stage to 2, which "
            f"supports this"
        )
    decided = tuple(key for key in found if key in OF_SETTINGS and found[key] != "auto")
    others = {
        key: value
        for key, value in found.items()
        if key not in OF_SETTINGS and key != "zero_optimization" and value != "auto"
    }
    return DeepSpeedConfig(name, _without_auto(zero), others, decided)


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _device(zero: Mapping[str, Any], key: str) -> str:
    section = zero.get(key)
    return str(section.get("device", "none")) if isinstance(section, Mapping) else "none"
