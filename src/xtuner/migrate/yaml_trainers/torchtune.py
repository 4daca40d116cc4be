"""Translate YAML files of torchtune: SFT with full, LoRA and QLoRA tuning, and text completion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from xtuner.config.read import foreign
from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, UnreadError, use_all
from xtuner.migrate.xtuner.runtime import NEVER
from xtuner.migrate.yaml_trainers import torchtune_data
from xtuner.migrate.yaml_trainers.flat import lose_rest, lose_set, refuse_set
from xtuner.migrate.yaml_trainers.read_yaml import read

_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("phi3", "phi4")
_CROSS_ENTROPY = ("CE", "CrossEntropy", "LinearCrossEntropy")
_OTHER_RECIPES = {
    "teacher_model": "knowledge distillation is not supported",
    "policy_model": "reinforcement learning (PPO) is not supported yet",
    "ref_checkpointer": "preference tuning (DPO) is not supported yet",
}
_NO_INFLUENCE = (
    "output_dir device compile enable_activation_checkpointing enable_activation_offloading "
    "log_peak_memory_stats profiler save_adapter_weights_only optimizer_in_bwd low_cpu_ram "
    "custom_sharded_layers ac_mode ac_option log_level memory_efficient_fsdp_wrap loss collate_fn "
    "cudnn_deterministic_mode"
).split()
_SHARDING = "fsdp_cpu_offload tensor_parallel_dim tensor_parallel_plan fsdp".split()


def migrate(text: str, folder: Path) -> Draft:
    """Translate the file `text` to settings; `folder` is not used."""
    table, draft = read(text), Draft(foreign.TORCHTUNE)
    _fill(table, {key: value for key, value in table.items() if isinstance(value, str)})
    draft.kind = "sft"
    if _other_recipe(table, draft):
        return draft
    try:
        _model(table, draft)
        torchtune_data.read(table, draft)
        _schedule(table, draft)
        _runtime(table, draft)
    except UnreadError as error:
        draft.refuse_unread(error)
    except (TypeError, ValueError) as error:
        draft.refuse(0, "a value", f"has a type that torchtune does not accept: {error}")
    draft.kind = f"{draft.values.get('algorithm', 'sft')} {draft.values.get('tuning', '')}".strip()
    return draft


def _fill(value: Any, known: dict[str, str]) -> None:
    """Replace ``${name}`` by top-level strings."""
    pairs = list(value.items()) if isinstance(value, Table) else list(enumerate(value))
    for key, item in pairs:
        if isinstance(item, str):
            value[key] = re.sub(r"\$\{(\w+)\}", lambda m: known.get(m[1], m[0])[:1000], item)
        elif isinstance(item, Table | list):
            _fill(item, known)


def _other_recipe(table: Table, draft: Draft) -> bool:
    for key, why in _OTHER_RECIPES.items():
        if key in table:
            draft.postpone(table.line_of(key), key, why)
    loss = table.table("loss")
    if loss.last("_component_") in ("DPOLoss", "PPOLoss", "RSOLoss", "SimPOLoss"):
        line = table.line_of("loss")
        draft.postpone(line, loss.name("_component_"), "preference tuning is not supported yet")
    elif loss and not loss.last("_component_").startswith(_CROSS_ENTROPY):
        draft.refuse(table.line_of("loss"), loss.name("_component_"), "is not a cross entropy loss")
    if "epochs" not in table or ("dataset" not in table and "datasets" not in table):
        draft.refuse(0, "epochs, dataset", "are not both set, so nothing is trained")
    if "quantizer" in table:
        draft.refuse(
            table.line_of("quantizer"), "quantizer", "quantization-aware training is not supported"
        )
    return bool(draft.not_yet or draft.refused)


def _model(table: Table, draft: Draft) -> None:
    store = table.table("checkpointer")
    line = store.line_of("checkpoint_dir")
    if store.last("_component_") != "FullModelHFCheckpointer":
        draft.refuse(
            store.line,
            shown("checkpointer", store.name("_component_")),
            "only models in Hugging Face format are supported (FullModelHFCheckpointer)",
        )
    draft.set("pretrained_model_name_or_path", store.take("checkpoint_dir"), line)
    use_all(store)
    model = table.table("model")
    kind, line = model.last("_component_"), model.line_of("_component_")
    if "vision" in kind:
        draft.refuse(line, kind, "multimodal models are not supported")
    elif kind.startswith(("lora_", "qlora_")):
        _adapter(model, kind, draft)
    else:
        draft.set("tuning", "full", line)
    refuse_set(model, draft, [key for key in model if key not in model.used])


def _adapter(model: Table, kind: str, draft: Draft) -> None:
    quantized = kind.startswith("qlora_") or bool(model.take("quantize_base", False))
    draft.set("tuning", "qlora" if quantized else "lora", model.line)
    draft.carry(model, "lora_rank", "lora_r", 8)
    draft.carry(model, "lora_alpha", "lora_alpha", 16)
    draft.carry(model, "lora_dropout", "lora_dropout", 0.0)
    line = model.line_of("lora_attn_modules")
    attention = [str(name) for name in model.take("lora_attn_modules") or ()]
    names = ["o_proj" if name == "output_proj" else name for name in attention]
    names += _MLP if model.take("apply_lora_to_mlp", False) else ()
    if any(family in kind for family in _FUSED):
        draft.refuse(line, kind, "its layers are fused in xtuner, so adapters would differ")
    draft.set("lora_target_modules", names, line)
    if model.take("use_dora", False):
        draft.set("lora_config", {"use_dora": True}, model.line_of("use_dora"))
    refuse_set(model, draft, ("apply_lora_to_output",))


def _schedule(table: Table, draft: Draft) -> None:
    draft.carry(table, "batch_size", "batch_size", 1)
    draft.carry(table, "gradient_accumulation_steps", "accumulative_counts", 1)
    draft.carry(table, "epochs", "max_epochs", 1)
    most, line = table.take("max_steps_per_epoch"), table.line_of("max_steps_per_epoch")
    if most is not None and draft.values["max_epochs"] == 1:
        draft.set("max_steps", most, line)
    elif most is not None:
        draft.refuse(line, f"max_steps_per_epoch: {most}", "truncates each epoch; use max_steps")
    optimizer = table.table("optimizer")
    kind, line = optimizer.name("_component_"), optimizer.line_of("_component_")
    if not kind.startswith(("torch.optim.", "bitsandbytes.optim.")):
        draft.refuse(line, f"optimizer: {kind}", "is in neither torch.optim nor bitsandbytes")
    name = kind.rpartition(".")[2]
    draft.set("optim_type", name, line)
    draft.set("lr", float(optimizer.take("lr", 1e-3)), optimizer.line_of("lr"))
    decay = optimizer.take("weight_decay", 0.01 if "AdamW" in name else 0.0)
    draft.set("weight_decay", float(decay), optimizer.line_of("weight_decay"))
    betas = tuple(float(beta) for beta in optimizer.take("betas", (0.9, 0.999)))
    draft.set("betas", betas, optimizer.line_of("betas"))
    optimizer.pass_over("fused", "foreach")
    norm = table.take("clip_grad_norm")
    draft.set("max_norm", None if norm is None else float(norm), table.line_of("clip_grad_norm"))
    _learning_rate(table, draft)


def _learning_rate(table: Table, draft: Draft) -> None:
    scheduler, line = table.table("lr_scheduler"), table.line_of("lr_scheduler")
    kind = scheduler.last("_component_")
    draft.set("lr_schedule", "cosine" if kind else "constant", line)
    if kind and kind != "get_cosine_schedule_with_warmup":
        draft.refuse(line, f"lr_scheduler: {kind}", "is not supported")
    if steps := scheduler.take("num_warmup_steps"):
        draft.set("warmup_steps", steps, scheduler.line_of("num_warmup_steps"))
    else:
        draft.set("warmup_ratio", 0.0, line)
    if scheduler.take("num_cycles", 0.5) != 0.5:
        draft.refuse(line, "num_cycles", "the learning rate decays once, to 0")


def _runtime(table: Table, draft: Draft) -> None:
    number, line = table.take("dtype", "fp32"), table.line_of("dtype")
    names = {"bf16": "bfloat16", "fp32": "float32"}
    if number in names:
        draft.set("dtype", names[number], line)
    else:
        draft.refuse(line, f"dtype: {number}", "is not supported")
    if table.get("device") == "cpu":
        draft.set("device", "cpu", table.line_of("device"))
    if (seed := table.take("seed")) is not None:
        draft.set("seed", seed, table.line_of("seed"))
    every = table.take("log_every_n_steps", 1) or 1
    draft.set("logging_steps", every, table.line_of("log_every_n_steps"))
    draft.set("save_steps", NEVER, table.line_of("epochs"))
    if draft.values.get("max_epochs", 1) > 1:
        draft.lose(
            table.line_of("epochs"),
            "a checkpoint after each epoch",
            "save_steps counts steps; the last step is always saved",
        )
    logger = table.table("metric_logger")
    if logger.last("_component_") in ("WandBLogger", "CometLogger", "MLFlowLogger"):
        draft.lose(logger.line, logger.name("_component_"), "TensorBoard files are written")
    use_all(logger)
    draft.carry(table, "output_dir", "work_dir")
    lose_set(table, draft, _SHARDING)
    table.pass_over(*_NO_INFLUENCE)
    for key in _NO_INFLUENCE:
        use_all(table.get(key))
    lose_rest(table, draft)
