"""Common to the YAML readers: translate arguments of transformers' Trainer key by key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtuner.config.renames import own_value
from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, unused
from xtuner.migrate.xtuner.runtime import NEVER

_SPLIT_MEMORY = "each process holds a full copy of the model: same results, but more memory"
_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}
_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion_32bit": "Lion32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_8bit": "PagedLion8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "sgd": "SGD",
}


def carry_rows(table: Table, draft: Draft, rows: Iterable[tuple[str, str, Any]]) -> None:
    """Copy values that need no change; entries are (old name, new name, old default)."""
    for key, ours, default in rows:
        value = table.take(key, default)
        draft.set(ours, default if value is None else value, table.line_of(key))


def refuse_set(table: Table, draft: Draft, keys: Iterable[str]) -> None:
    """Report those of `keys` whose value enables something, as not supported."""
    for key in keys:
        value = table.take(key)
        if value not in (None, False, 0, "", "none", "None"):
            draft.refuse(table.line_of(key), shown(key, value), "is not supported")


def lose_set(table: Table, draft: Draft, keys: Iterable[str], why: str = _SPLIT_MEMORY) -> None:
    """Report those of `keys` that have a value as dropped."""
    for key in keys:
        value = table.take(key)
        if value not in (None, False, "", "none", []):
            draft.lose(table.line_of(key), shown(key, value), why)


def lose_rest(table: Table, draft: Draft) -> None:
    """List how to resume, and the keys of the file that nothing has read."""
    if table.take("resume_from_checkpoint"):
        line = table.line_of("resume_from_checkpoint")
        draft.note(line, "resume_from_checkpoint", "use `xtuner train --resume`")
    for line, path, value in unused(table, ""):
        if value not in (None, False):
            draft.lose(line, shown(path.lstrip("."), value), "has no counterpart")


def training_arguments(table: Table, draft: Draft) -> None:
    """Translate the arguments of transformers' Trainer."""
    carry_rows(
        table,
        draft,
        (
            ("per_device_train_batch_size", "batch_size", 8),
            ("gradient_accumulation_steps", "accumulative_counts", 1),
            ("dataloader_num_workers", "dataloader_num_workers", 0),
            ("seed", "seed", 42),
            ("save_total_limit", "save_total_limit", -1),
        ),
    )
    for key, ours, default in (
        ("learning_rate", "lr", 5e-5),
        ("weight_decay", "weight_decay", 0.0),
    ):
        draft.set(ours, float(table.take(key, default)), table.line_of(key))
    norm = float(table.take("max_grad_norm", 1.0))
    draft.set("max_norm", norm or None, table.line_of("max_grad_norm"))
    betas = (float(table.take("adam_beta1", 0.9)), float(table.take("adam_beta2", 0.999)))
    draft.set("betas", betas, table.line_of("adam_beta1"))
    _optimizer(table, draft)
    _schedule(table, draft)
    _length(table, draft)
    _intervals(table, draft)
    _number_type(table, draft)


def _optimizer(table: Table, draft: Draft) -> None:
    name = str(table.take("optim", "adamw_torch"))
    known = _OPTIMIZERS.get(name) or own_value("optim_type", name)
    if known != name:
        draft.set("optim_type", known, table.line_of("optim"))
    else:
        draft.refuse(table.line_of("optim"), f"optim: {name}", "is not supported")
    epsilon = float(table.take("adam_epsilon", 1e-8))
    if epsilon != 1e-8:
        draft.lose(
            table.line_of("adam_epsilon"), f"adam_epsilon: {epsilon}", "epsilon is always 1e-8"
        )


def _schedule(table: Table, draft: Draft) -> None:
    kind, line = str(table.take("lr_scheduler_type", "linear")), table.line_of("lr_scheduler_type")
    if kind not in _SCHEDULES:
        draft.refuse(line, f"lr_scheduler_type: {kind}", "is not supported")
        return
    draft.set("lr_schedule", _SCHEDULES[kind], line)
    options = table.table("lr_scheduler_kwargs")
    least = options.take("min_lr")
    if least is not None:
        ratio = float(least) / float(draft.values["lr"])
        draft.set("lr_end_ratio", round(ratio, 12), options.line)
    if (rate := options.take("min_lr_rate")) is not None:
        draft.set("lr_end_ratio", float(rate), options.line)
    ratio, steps = float(table.take("warmup_ratio", 0.0) or 0), table.take("warmup_steps", 0) or 0
    if kind == "constant":
        ratio, steps = 0.0, 0
    if isinstance(steps, float) and 0 < steps < 1:  # a ratio, in newer versions of transformers
        ratio, steps = steps, 0
    if steps:
        draft.set("warmup_steps", int(steps), table.line_of("warmup_steps"))
    else:
        draft.set("warmup_ratio", ratio, table.line_of("warmup_ratio"))


def _length(table: Table, draft: Draft) -> None:
    epochs, steps = table.take("num_train_epochs", 3.0), table.take("max_steps", -1)
    line = table.line_of("num_train_epochs")
    if isinstance(steps, int) and steps > 0:
        draft.set("max_steps", steps, table.line_of("max_steps"))
        draft.set("max_epochs", steps, table.line_of("max_steps"))
    elif isinstance(epochs, int | float) and epochs == int(epochs):
        draft.set("max_epochs", int(epochs), line)
    else:
        draft.refuse(line, f"num_train_epochs: {epochs}", "use an integer, or max_steps")


def _intervals(table: Table, draft: Draft) -> None:
    logging = table.take("logging_steps", 500)
    draft.set("logging_steps", int(logging) or 1, table.line_of("logging_steps"))
    strategy, line = str(table.take("save_strategy", "steps")), table.line_of("save_strategy")
    every = table.take("save_steps", 500)
    if strategy == "steps" and isinstance(every, int):
        draft.set("save_steps", every, table.line_of("save_steps"))
        return
    draft.set("save_steps", NEVER, line)
    if strategy == "epoch":
        draft.set("save_epochs", 1, line)
    elif strategy != "no":
        draft.lose(line, f"save_strategy: {strategy}", "save_steps counts steps")


def _number_type(table: Table, draft: Draft) -> None:
    half, brain = table.take("fp16", False), table.take("bf16", False)
    pure = table.take("pure_bf16", False)
    line = table.line_of("fp16" if half else "bf16")
    if half:
        draft.note(line, "fp16: true", "dtype = 'auto' uses bfloat16 if supported")
    elif brain or pure:
        draft.set("dtype", "bfloat16", line)
    else:
        draft.set("dtype", "float32", line)
    table.pass_over("tf32")
