"""Translate optimizer, learning rate, run length and step counts of an old config.

XTuner 0.x counts data loader iterations of one process, which are micro-batches here; with
``steps_are = "micro_batches"`` every step count of the migrated file counts them.
"""

from __future__ import annotations

from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, written

_WRAPPERS = ("AmpOptimWrapper", "OptimWrapper", "DeepSpeedOptimWrapper", "")


def read(config: Table, draft: Draft) -> None:
    """Translate ``optim_wrapper``, ``train_cfg``, ``param_scheduler`` and sequence parallelism."""
    draft.set("steps_are", "micro_batches", config.line_of("train_cfg"))
    wrapper = config.table("optim_wrapper")
    _optimizer(wrapper, draft)
    draft.carry(wrapper, "accumulative_counts", "accumulative_counts", 1)
    shared = config.take("sequence_parallel_size", 1)
    if wrapper.last() == "DeepSpeedOptimWrapper":
        _deepspeed(config.table("strategy"), draft)
    if shared != 1:
        draft.set("sequence_parallel_size", shared, config.line_of("sequence_parallel_size"))
    _length(config.table("train_cfg"), config.line_of("train_cfg"), draft)
    _learning_rate(config, draft)


def _optimizer(wrapper: Table, draft: Draft) -> None:
    if wrapper.last() not in _WRAPPERS:
        draft.refuse(wrapper.line, shown("optim_wrapper", wrapper.get("type")), "is not supported")
    number = wrapper.take("dtype")
    for name in ("bfloat16", "float32"):
        if str(number) in (name, f"torch.{name}") and "dtype" not in draft.values:
            draft.set("dtype", name, wrapper.line_of("dtype"))
    wrapper.pass_over("loss_scale", "use_fsdp", "cache_enabled")
    optimizer = wrapper.table("optimizer")
    kind, line = optimizer.name(), optimizer.line_of("type")
    home, _, name = kind.rpartition(".")
    if not name:
        draft.refuse(line, shown("optimizer.type", optimizer.get("type")), "is not an optimizer")
    if home and not home.startswith(("torch.optim", "bitsandbytes")):
        draft.refuse(line, f"optimizer = {kind}", "is in neither torch.optim nor bitsandbytes")
    draft.set("optim_type", name, line)
    draft.set("lr", float(optimizer.take("lr", 1e-3)), optimizer.line_of("lr"))
    betas = optimizer.take("betas", (0.9, 0.999))
    draft.set("betas", tuple(map(float, betas)), optimizer.line_of("betas"))
    decay = float(optimizer.take("weight_decay", 0.01 if name == "AdamW" else 0.0))
    draft.set("weight_decay", decay, optimizer.line_of("weight_decay"))
    if decay:
        draft.note(
            optimizer.line_of("weight_decay"),
            f"weight_decay = {decay}",
            "is not applied to biases and norms",
        )
    clip = wrapper.table("clip_grad")
    norm = clip.take("max_norm")
    clip.pass_over("error_if_nonfinite", "norm_type", "type")
    draft.set("max_norm", None if norm is None else float(norm), wrapper.line_of("clip_grad"))
    for key in ("paramwise_cfg", "constructor"):
        if wrapper.take(key) is not None:
            draft.refuse(wrapper.line_of(key), key, "parameter groups are not supported")


def _deepspeed(strategy: Table, draft: Draft) -> None:
    """Translate the DeepSpeed settings in ``strategy``."""
    inner = strategy.table("config")
    for key, ours in (
        ("gradient_accumulation_steps", "accumulative_counts"),
        ("gradient_clipping", "max_norm"),
        ("train_micro_batch_size_per_gpu", "batch_size"),
    ):
        value = strategy.take(key, inner.take(key))
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value) if ours == "max_norm" else int(value)
            draft.set(ours, number, strategy.line_of(key))
        elif ours == "accumulative_counts":
            line = strategy.line_of(key)
            draft.refuse(line, shown(f"strategy.{key}", value), "write the number of micro-batches")
    shared = strategy.take("sequence_parallel_size", 1)
    if shared != 1:
        draft.set("sequence_parallel_size", shared, strategy.line_of("sequence_parallel_size"))


def _length(cfg: Table, line: int, draft: Draft) -> None:
    cfg.pass_over("type", "by_epoch", "val_begin")
    iterations, epochs = cfg.take("max_iters"), cfg.take("max_epochs")
    if iterations is not None:
        draft.set("max_steps", int(iterations), cfg.line_of("max_iters"))
        draft.set("max_epochs", int(iterations), cfg.line_of("max_iters"))
    elif isinstance(epochs, int | float) and epochs == int(epochs):
        draft.set("max_epochs", int(epochs), cfg.line_of("max_epochs"))
    else:
        draft.refuse(line, shown("train_cfg.max_epochs", epochs), "must be an integer")
    if cfg.take("val_interval") is not None:
        draft.lose(cfg.line_of("val_interval"), "val_interval", "see val_dataloader")


def _learning_rate(config: Table, draft: Draft) -> None:
    line = config.line_of("param_scheduler")
    given = config.get("param_scheduler")
    parts = [given] if isinstance(given, Table) else config.listed("param_scheduler")
    config.used.add("param_scheduler")
    if not all(isinstance(part, Table) for part in parts):
        draft.refuse(line, "param_scheduler", "is not a list of dicts")
        return
    warmup = 0.0
    if parts and _rises(parts[0]):
        rise = parts.pop(0)
        if rise.get("begin", 0) != 0:
            draft.refuse(
                rise.line_of("begin"), shown("begin", rise["begin"]), "the warmup must begin at 0"
            )
        warmup = _share(rise, "end", draft)
    draft.set("warmup_ratio", warmup, line)
    if not parts:
        draft.set("lr_schedule", "constant", line)
    elif len(parts) > 1:
        draft.refuse(parts[1].line, "param_scheduler", "has more phases than a warmup and a decay")
    else:
        _fall(parts[0], warmup, draft)


def _rises(part: Table) -> bool:
    start, end = part.get("start_factor", 1 / 3), part.get("end_factor", 1.0)
    return part.last() == "LinearLR" and isinstance(start, int | float) and start < end


def _fall(part: Table, warmup: float, draft: Draft) -> None:
    kind = part.last()
    begin, end = _share(part, "begin", draft), _share(part, "end", draft)
    if abs(begin - warmup) > 1e-6 or abs(end - 1.0) > 1e-6:
        draft.refuse(
            part.line,
            f"{kind} from {begin:g} to {end:g} of the run",
            "the decay must begin at the end of the warmup and end with the run",
        )
    floor = 0.0
    if kind == "CosineAnnealingLR":
        draft.set("lr_schedule", "cosine", part.line)
        ratio = part.take("eta_min_ratio")
        least = part.take("eta_min") or 0.0
        floor = float(ratio) if ratio is not None else float(least) / draft.values["lr"]
        part.pass_over("T_max")
    elif kind == "LinearLR" and part.take("start_factor", 1 / 3) == 1.0:
        draft.set("lr_schedule", "linear", part.line)
        floor = float(part.take("end_factor", 1.0))
    elif kind == "ConstantLR" and part.take("factor", 1 / 3) == 1.0:
        draft.set("lr_schedule", "constant", part.line)
    else:
        draft.refuse(part.line, shown("type", part.get("type")), "is not a supported schedule")
    if floor:
        draft.set("lr_end_ratio", round(floor, 12), part.line_of("eta_min"))


def _share(part: Table, key: str, draft: Draft) -> float:
    """The begin or end of `part` as a fraction of the run."""
    part.pass_over(
        "type", "by_epoch", "convert_to_iter_based", "start_factor", "end_factor", "verbose"
    )
    by_epoch = part.get("by_epoch", True)
    if by_epoch and not part.get("convert_to_iter_based", False):
        draft.refuse(
            part.line, part.last(), "changes the learning rate once per epoch, not every step"
        )
    total: Any = draft.values.get("max_epochs" if by_epoch else "max_steps")
    if by_epoch and "max_steps" in draft.values:
        draft.refuse(
            part.line_of(key),
            f"{part.last()}.{key} = {written(part.get(key))}",
            "counts epochs in a run that counts iterations, so the schedule depends on the number "
            "of rows; set by_epoch=False",
        )
        part.pass_over("begin", "end")
        return 0.0
    value = part.take(key)
    part.pass_over("begin", "end")
    if value is None:
        return 0.0 if key == "begin" else 1.0
    if not isinstance(value, int | float) or not total:
        draft.refuse(
            part.line_of(key),
            f"{part.last()}.{key} = {written(value)}",
            "counts iterations in a run that counts epochs; set by_epoch=True",
        )
        return 0.0 if key == "begin" else 1.0
    return float(round(value / total, 9))
