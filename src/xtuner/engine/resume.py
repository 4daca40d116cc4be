"""Which settings a resumed run must share with the run that wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.models.run_info import RunInfo

SHAPING_SETTINGS = tuple(
    "pretrained_model_name_or_path algorithm tuning lora_r lora_target_modules "
    "lora_modules_to_save quantization double_quant optim_type visual_encoder_name_or_path "
    "freeze_llm freeze_visual_encoder visual_encoder_lora_r visual_select_layer".split()
)
"""Settings by which trained weights and optimizer state are made: a resume cannot change them."""

ORDERING_SETTINGS = tuple(
    "data_path data_repeats data_weights max_dataset_length validation_ratio SYSTEM "
    "prompt_template max_length pack_to_max_length overlong shuffle batch_size "
    "accumulative_counts max_epochs max_steps lr betas weight_decay max_norm warmup_ratio "
    "lr_schedule lora_alpha lora_dropout dtype seed visual_encoder_lora_alpha "
    "visual_encoder_lora_dropout image_folder pad_image_to_square group_by_modality".split()
)
"""Settings that a resume may change, but then the run is no longer the straight one."""


def identity_of(settings: Settings, dataset: str, *, processes: int) -> dict[str, Any]:
    """What a resumed run should share; `dataset` is the fingerprint of the training data."""
    names = (*SHAPING_SETTINGS, *ORDERING_SETTINGS)
    values = {name: _plain(getattr(settings, name)) for name in names}
    return {**values, "dataset": dataset, "num_processes": processes}


def check_shape(source: Path, settings: Settings) -> None:
    """Refuse the checkpoint `source` if its weights were made by other settings.

    Raises:
        CheckpointError: names each of them.
    """
    info = RunInfo.read(source)
    before = dict(info.settings) if info else {}
    wrong = [
        f"{name}: {before[name]!r} then, {now!r} now"
        for name in SHAPING_SETTINGS
        if name in before and _plain(before[name]) != (now := _plain(getattr(settings, name)))
    ]
    if wrong:
        raise CheckpointError(
            f"cannot resume from {source}: its weights were made by other settings: "
            f"{'; '.join(wrong)}. Set them back, or train anew with --work-dir DIR"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
