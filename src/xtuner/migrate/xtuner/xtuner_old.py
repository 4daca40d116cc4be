"""Translate configs of XTuner 0.1 and 0.2.

    Table ──model, data, schedule, runtime──► Draft

Each part reads the tables of the config, never the helper variables at the top of the file, which
matter only through the tables. Keys that no part reads are reported as dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from xtuner.config.read import foreign
from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, Unread, UnreadError, unused, use_all, written
from xtuner.migrate.xtuner import data, runtime, schedule
from xtuner.migrate.xtuner import model as old_model
from xtuner.migrate.xtuner.names import names
from xtuner.migrate.yaml_trainers import hf_trainer

_WITHOUT_INFLUENCE = (
    "env_cfg log_level log_processor default_scope launcher runner_type visualizer cfg "
    "work_dir default_hooks find_unused_parameters model_wrapper_cfg"
).split()
_ROOTS = (
    "model tokenizer train_dataloader optim_wrapper param_scheduler train_cfg custom_hooks "
    "default_hooks randomness strategy"
).split()
_EVALUATION = "val_dataloader val_evaluator val_cfg test_dataloader test_evaluator test_cfg".split()


def migrate(config: Table, *, systems: Mapping[str, str] | None = None) -> Draft:
    """Translate `config` to settings.

    Args:
        config: The old config.
        systems: System messages of the old package, by name.
    """
    draft = Draft(foreign.XTUNER_OLD, systems=systems or {})
    if "model" not in config:
        draft.refuse(0, "model", "is missing: this is not a training config")
        return draft
    if _other_framework(config, draft) or _not_yet(config, draft):
        return draft
    for part in (old_model, data, schedule, runtime):
        try:
            part.read(config, draft)
        except UnreadError as error:
            draft.refuse_unread(error)
    draft.kind = _kind(draft)
    _list_the_rest(config, draft)
    return draft


def _other_framework(config: Table, draft: Draft) -> bool:
    if config.get("framework") != "huggingface":
        return False
    try:
        hf_trainer.read(config, draft)
    except UnreadError as error:
        draft.refuse_unread(error)
    draft.kind = f"{_kind(draft)}, Hugging Face Trainer"
    return True


def _not_yet(config: Table, draft: Draft) -> bool:
    """Report model classes that this version does not support; return whether it is one."""
    model = config.table("model")
    reason = names("not_yet").get(model.last())
    if reason:
        draft.kind = model.last()
        draft.postpone(model.line_of("type"), f"model.type = {model.name()}", reason)
    return bool(reason)


def _kind(draft: Draft) -> str:
    values = draft.values
    if "visual_encoder_name_or_path" in values:
        only_projector = values.get("freeze_llm") and values.get("tuning") == "full"
        return "LLaVA pretraining" if only_projector else f"LLaVA {values.get('tuning')}"
    return f"{values.get('algorithm', 'sft')} {values.get('tuning', 'full')}"


def _list_the_rest(config: Table, draft: Draft) -> None:
    """Report keys that no part has read and that may matter."""
    for key in _EVALUATION:
        if config.get(key) is not None:
            draft.lose(
                config.line_of(key),
                key,
                "benchmarks during training are not supported; validation_ratio measures the loss",
            )
    for key in _WITHOUT_INFLUENCE:
        if key not in _ROOTS:
            use_all(config.get(key))
    for key in _ROOTS:
        for line, path, value in unused(config.get(key), key):
            if value is None or value is False or value == []:
                continue
            if isinstance(value, Unread):
                draft.lose(value.line, value.text, value.why)
            else:
                draft.lose(line, shown(path, value), "has no counterpart")
    for key in ("custom_imports", "auto_scale_lr", "compile", "sync_bn"):
        if config.get(key):
            draft.lose(config.line_of(key), f"{key} = {written(config[key])}", "has no counterpart")
