"""Checks of settings that cannot be combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from xtuner import plugins
from xtuner.config.renames import no_counterpart
from xtuner.config.schema import Settings
from xtuner.errors import count, did_you_mean
from xtuner.types import IMAGE

ALGORITHMS = "xtuner.algorithms"

Check = Callable[["Settings"], Iterator[tuple[str, str]]]


def check_combinations(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (setting, problem) for every invalid combination."""
    for check in CHECKS:
        yield from check(settings)


def _check_quantization(s: Settings) -> Iterator[tuple[str, str]]:
    if s.llm_training == "full" and s.effective_quantization != "none":
        yield (
            "quantization",
            "quantized weights cannot be fully trained; "
            "set tuning = 'qlora' or quantization = 'none'",
        )
    if s.tuning == "lora" and s.effective_quantization != "none":
        yield (
            "quantization",
            "LoRA on quantized weights is tuning = 'qlora'; set that, or quantization = 'none'",
        )
    if s.tuning == "qlora" and s.quantization == "none":
        yield (
            "quantization",
            "tuning = 'qlora' needs quantized weights; "
            "set tuning = 'lora' or quantization = 'auto'",
        )


def _check_embedding_on_cpu(s: Settings) -> Iterator[tuple[str, str]]:
    if s.embedding_on_cpu is True and not s.can_keep_embedding_on_cpu:
        yield (
            "embedding_on_cpu",
            "requires tuning = 'lora' or 'qlora', strategy = 'replicated', resize_embeddings = "
            "False and no vision tower; set it to 'auto'",
        )


def _check_paged_optimizer(s: Settings) -> Iterator[tuple[str, str]]:
    if s.paged_optimizer is True and not s.optim_type.startswith("Paged"):
        yield (
            "paged_optimizer",
            f"optim_type = {s.optim_type!r} has no paged state; set optim_type to a paged "
            "optimizer such as 'PagedAdamW32bit', or paged_optimizer = 'auto'",
        )


def _check_vision(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.has_vision:
        if s.freeze_llm:
            yield (
                "freeze_llm",
                "would leave nothing to train; it requires visual_encoder_name_or_path",
            )
        return
    if IMAGE in s.SYSTEM:
        yield "SYSTEM", f"contains {IMAGE}; images belong in the user turns of the data"
    if s.visual_encoder_lora_r is not None and not s.freeze_visual_encoder:
        yield (
            "visual_encoder_lora_r",
            "adapters require frozen weights; set freeze_visual_encoder = True, or "
            "visual_encoder_lora_r = None",
        )
    if s.cache_visual_features and s.visual_encoder_training != "frozen":
        yield (
            "cache_visual_features",
            "the vision tower is trained, so its features change; set it to False",
        )


def _check_evaluation_images(s: Settings) -> Iterator[tuple[str, str]]:
    images, questions = len(s.evaluation_images), len(s.evaluation_inputs)
    if images > 1 and images != questions:
        yield (
            "evaluation_images",
            f"has {images} entries, but evaluation_inputs has {questions}; "
            "give one, or one per question",
        )


def _check_lora_modules_to_save(s: Settings) -> Iterator[tuple[str, str]]:
    if s.has_vision and s.lora_modules_to_save:
        yield (
            "lora_modules_to_save",
            "is not supported with a vision tower; remove it",
        )


def _check_resize_embeddings(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.resize_embeddings:
        return
    if s.has_vision:
        yield "resize_embeddings", "is not supported with a vision tower; remove it"
    if s.uses_adapter and s.strategy != "replicated":
        yield (
            "resize_embeddings",
            f"is not supported with adapters and strategy = {s.strategy!r}; set strategy = "
            "'replicated' or tuning = 'full'",
        )


def _check_sequence_parallel(s: Settings) -> Iterator[tuple[str, str]]:
    if s.sequence_parallel_size != 1 and s.attn_implementation not in ("auto", "xtuner"):
        yield (
            "sequence_parallel_size",
            f"attn_implementation = {s.attn_implementation!r} takes entire rows; set "
            "attn_implementation = 'auto', or sequence_parallel_size = 1",
        )


def _check_pack_length(s: Settings) -> Iterator[tuple[str, str]]:
    if s.pack_length != "auto" and s.pack_length > s.max_length:
        yield "pack_length", f"must be at most max_length, which is {s.max_length}; raise that"


def _check_data_path(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.data_path or not all(s.data_path):
        yield "data_path", "is empty; name a file, a folder or a data set on the hub"


def _check_dataset_format(s: Settings) -> Iterator[tuple[str, str]]:
    formats, sources = len(s.dataset_format), len(s.data_path)
    if formats not in (1, sources):
        yield (
            "dataset_format",
            f"has {formats} entries, but data_path has {sources}; give one, or one per source",
        )


def _check_one_mix(s: Settings) -> Iterator[tuple[str, str]]:
    if s.data_repeats is not None and s.data_weights is not None:
        yield "data_weights", "cannot be combined with data_repeats; keep one of the two"


def _check_shares(name: str, s: Settings) -> Iterator[tuple[str, str]]:
    values: tuple[float, ...] | None = getattr(s, name)
    if values is None:
        return
    sources = len(s.data_path)
    if len(values) != sources:
        yield (
            name,
            f"has {count(len(values), 'entry', 'entries')}, but data_path has {sources}; give one "
            "per source",
        )
    if any(v < 0 for v in values) or not any(values):
        yield name, "numbers must be 0 or more, and at least one above 0"


def _check_algorithm(s: Settings) -> Iterator[tuple[str, str]]:
    """The checks of a built-in algorithm; a user's own is checked when the run loads it."""
    if s.algorithm in plugins.names(ALGORITHMS):
        module = plugins.load(ALGORITHMS, s.algorithm, setting="algorithm")
        yield from module.Algorithm.check(s)


def _check_validation(s: Settings) -> Iterator[tuple[str, str]]:
    if s.validation_path and s.validation_ratio:
        yield "validation_path", "is given, so validation_ratio must be 0"
    wants_best = s.keep_best or s.early_stopping_patience is not None
    measured = bool(s.validation_path) or s.validation_ratio > 0
    if wants_best and s.best_metric == "val_loss" and not measured:
        name = "keep_best" if s.keep_best else "early_stopping_patience"
        yield name, "needs a validation loss: set validation_path or validation_ratio"


TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
"""Values of the setting `report_to`; each is a hook of that name."""


def _check_trackers(s: Settings) -> Iterator[tuple[str, str]]:
    for name in s.report_to:
        if name not in TRACKERS:
            instead = no_counterpart("report_to", name)
            guess = f"; {instead}" if instead else did_you_mean(name, TRACKERS)
            yield "report_to", f"{name!r} is not one of {', '.join(map(repr, TRACKERS))}{guess}"


def _check_single_layout(s: Settings) -> Iterator[tuple[str, str]]:
    """Options that need entire rows, or their own parameter groups."""
    if s.neftune_noise_alpha is not None and s.sequence_parallel_size > 1:
        yield "neftune_noise_alpha", "needs entire rows: set sequence_parallel_size = 1"
    if s.loraplus_lr_ratio is not None and s.strategy.startswith("deepspeed"):
        yield "loraplus_lr_ratio", "is not supported by DeepSpeed; set strategy = 'fsdp2'"


CHECKS: tuple[Check, ...] = (
    _check_quantization,
    _check_embedding_on_cpu,
    _check_paged_optimizer,
    _check_vision,
    _check_evaluation_images,
    _check_lora_modules_to_save,
    _check_resize_embeddings,
    _check_sequence_parallel,
    _check_pack_length,
    _check_data_path,
    _check_dataset_format,
    _check_one_mix,
    partial(_check_shares, "data_repeats"),
    partial(_check_shares, "data_weights"),
    _check_validation,
    _check_trackers,
    _check_single_layout,
    _check_algorithm,
)
"""The checks of `check_combinations`; each can run alone when other settings are invalid."""
