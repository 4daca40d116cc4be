"""Translate YAML files of LLaMA-Factory: SFT and pretraining, with full, LoRA and QLoRA tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtuner.config.combinations import TRACKERS
from xtuner.config.read import foreign
from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, UnreadError
from xtuner.migrate.yaml_trainers import llamafactory_data
from xtuner.migrate.yaml_trainers.flat import (
    carry_rows,
    lose_rest,
    lose_set,
    refuse_set,
    training_arguments,
)
from xtuner.migrate.yaml_trainers.read_yaml import read

_NOT_YET = {
    "dpo": "preference tuning (DPO, ORPO, SimPO) is not supported yet",
    "kto": "preference tuning (KTO) is not supported yet",
    "rm": "reward models are not supported yet",
    "ppo": "reinforcement learning (PPO) is not supported yet",
}
_CHANGES = (
    "use_galore use_apollo use_badam use_adam_mini use_dft_loss use_asft_loss use_eaft_loss "
    "use_llama_pro mask_history mixture_of_depths rope_scaling shift_attn adapter_name_or_path "
    "add_tokens add_special_tokens new_special_tokens_config moe_aux_loss_coef use_mca fp8 "
    "train_mm_proj_only freeze_trainable_layers freeze_extra_modules use_kt tokenized_path "
    "image_max_pixels video_max_pixels freeze_vision_tower freeze_multi_modal_projector "
    "freeze_language_model"
).split()
_VARIANTS = (
    "use_rslora", "use_dora", "pissa_init", "pissa_iter", "pissa_convert", "loraplus_lr_ratio",
    "loraplus_lr_embedding",
)  # fmt: skip
"""Arguments of adapters, which full tuning does not read."""
_NO_INFLUENCE = (
    "do_train plot_loss overwrite_output_dir overwrite_cache save_only_model ddp_timeout cache_dir "
    "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc disable_gradient_checkpointing "
    "gradient_checkpointing use_reentrant_gc use_fast_tokenizer low_cpu_mem_usage model_revision "
    "include_num_input_tokens_seen include_effective_tokens_per_second preprocessing_batch_size "
    "per_device_eval_batch_size logging_first_step logging_dir logging_strategy "
    "ddp_find_unused_parameters upcast_layernorm upcast_lmhead_output hf_hub_token ms_hub_token "
    "predict_with_generate push_to_hub run_name local_rank enable_thinking data_seed use_swanlab "
    "use_v1_kernels print_param_status trust_remote_code buffer_size dispatch_batches do_eval "
    "data_shared_file_system"
).split()
_SHARDING = ("deepspeed", "fsdp", "fsdp_config", "streaming", "group_by_length", "use_ray")
_OF_FAMILIES_NO_MODEL = ("default", "alpaca", "empty", "fewshot", "vicuna", "chatml", "zephyr")


def migrate(text: str, folder: Path) -> Draft:
    """Translate the file `text` in `folder` to settings."""
    table, draft = read(text), Draft(foreign.LLAMA_FACTORY)
    stage = str(table.take("stage", "sft"))
    draft.kind = stage
    if stage in _NOT_YET:
        draft.postpone(table.line_of("stage"), f"stage: {stage}", _NOT_YET[stage])
        return draft
    if stage not in ("sft", "pt"):
        draft.refuse(table.line_of("stage"), f"stage: {stage}", "is neither sft nor pt")
        return draft
    if not table.take("do_train", False):
        draft.refuse(table.line_of("do_train"), "do_train", "is not true, so nothing is trained")
        return draft
    try:
        _model(table, draft)
        _adapter(table, draft)
        training_arguments(table, draft)
        _data(table, draft, stage, folder)
        _rest(table, draft)
    except UnreadError as error:
        draft.refuse_unread(error)
    except (TypeError, ValueError) as error:
        draft.refuse(0, "a value", f"has a type that LLaMA-Factory does not accept: {error}")
    draft.kind = f"{draft.values.get('algorithm', 'sft')} {draft.values.get('tuning', '')}"
    return draft


def _model(table: Table, draft: Draft) -> None:
    line = table.line_of("model_name_or_path")
    draft.set("pretrained_model_name_or_path", table.take("model_name_or_path"), line)
    bits, line = table.take("quantization_bit"), table.line_of("quantization_bit")
    method = str(table.take("quantization_method", "bnb")).lower()
    kind, double = table.take("quantization_type", "nf4"), table.take("double_quantization", True)
    table.pass_over("quantization_device_map")
    if bits is None:
        return
    if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        draft.refuse(line, f"quantization: {bits} bits, {method}", "only bitsandbytes with 4 or 8")
        return
    draft.set("quantization", kind if bits == 4 else "int8", line)
    if bits == 4:
        draft.set("double_quant", bool(double), table.line_of("double_quantization"))


def _adapter(table: Table, draft: Draft) -> None:
    kind, line = table.take("finetuning_type", "lora"), table.line_of("finetuning_type")
    if kind not in ("lora", "full"):
        draft.refuse(line, f"finetuning_type: {kind}", "is neither lora nor full")
        return
    quantized = "quantization" in draft.values
    draft.set("tuning", "full" if kind == "full" else "qlora" if quantized else "lora", line)
    keys = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target")
    if kind == "full":
        table.pass_over(*keys, *_VARIANTS, "create_new_adapter")
        return
    carry_rows(table, draft, (("lora_rank", "lora_r", 8), ("lora_dropout", "lora_dropout", 0.0)))
    alpha = table.take("lora_alpha") or 2 * draft.values["lora_r"]
    draft.set("lora_alpha", alpha, table.line_of("lora_alpha"))
    table.pass_over("create_new_adapter")
    target = table.take("lora_target", "all")
    names = _split(target)
    draft.set(
        "lora_target_modules",
        ["all-linear"] if names == ["all"] else names,
        table.line_of("lora_target"),
    )
    if saved := _split(table.take("additional_target")):
        draft.set("lora_modules_to_save", saved, table.line_of("additional_target"))
    _variants(table, draft)


def _variants(table: Table, draft: Draft) -> None:
    """Set what changes how adapters are scaled, started and trained."""
    further: dict[str, Any] = {}
    for key in ("use_rslora", "use_dora"):
        if table.take(key, False):
            further[key] = True
            draft.lines["lora_config"] = table.line_of(key)
    if table.take("pissa_init", False):
        further["init_lora_weights"] = "pissa"
        draft.lines["lora_config"] = line = table.line_of("pissa_init")
        if int(table.take("pissa_iter", 16)) > 0:
            draft.note(line, "pissa_iter", "the singular values are exact, not approximated")
    table.pass_over("pissa_iter", "pissa_convert")
    if further:
        draft.set("lora_config", further, draft.lines["lora_config"])
    if ratio := table.take("loraplus_lr_ratio"):
        draft.set("loraplus_lr_ratio", float(ratio), table.line_of("loraplus_lr_ratio"))
    if float(table.take("loraplus_lr_embedding", 1e-6) or 1e-6) != 1e-6:
        line = table.line_of("loraplus_lr_embedding")
        draft.lose(line, "loraplus_lr_embedding", "embeddings are trained with lr")


def _data(table: Table, draft: Draft, stage: str, folder: Path) -> None:
    llamafactory_data.read(table, draft, folder)
    on_prompt = bool(table.take("train_on_prompt", False))
    if stage == "pt" or on_prompt:
        draft.set("algorithm", "pretrain", table.line_of("stage"))
        draft.set("overlong", "truncate", table.line_of("cutoff_len"))
    draft.carry(table, "cutoff_len", "max_length", 2048)
    packing, neat = table.take("packing"), table.take("neat_packing", False)
    packed = bool(neat) or (stage == "pt" if packing is None else bool(packing))
    draft.set("pack_to_max_length", packed, table.line_of("packing"))
    if packed and not neat:
        draft.note(
            table.line_of("packing"), "packing", "packed samples do not attend to each other"
        )
    _template(table, draft, stage)
    draft.carry(table, "default_system", "SYSTEM")
    draft.carry(table, "preprocessing_num_workers", "dataset_num_proc")
    _validation(table, draft)


def _template(table: Table, draft: Draft, stage: str) -> None:
    name, line = table.take("template"), table.line_of("template")
    table.pass_over("tool_format")
    if stage == "pt":
        draft.set("prompt_template", "plain", line)
    elif name is None or name in _OF_FAMILIES_NO_MODEL:
        draft.refuse(
            line,
            shown("template", name),
            "is not the template of a chat model; use the model's own template in this file, then "
            "set prompt_template (see `xtuner explain prompt_template`)",
        )
    else:
        draft.set("prompt_template", "auto", line)
        draft.note(line, f"template: {name}", "the chat template of the model is used")


def _validation(table: Table, draft: Draft) -> None:
    size, line = table.take("val_size", 0.0) or 0.0, table.line_of("val_size")
    if 0 < size <= 0.5:
        draft.set("validation_ratio", float(size), line)
    elif size:
        draft.lose(line, f"val_size: {size}", "validation_ratio is a fraction of at most 0.5")
    every = table.take("eval_steps")
    strategy = table.take("eval_strategy", table.take("evaluation_strategy", "no"))
    if every and strategy == "steps":
        draft.set("evaluation_freq", int(every), table.line_of("eval_steps"))
    lose_set(table, draft, ("eval_dataset",), "set validation_path to its file")
    best, metric = table.take("load_best_model_at_end"), table.take("metric_for_best_model")
    if best and metric in (None, "loss", "eval_loss") and "validation_ratio" in draft.values:
        draft.set("keep_best", True, table.line_of("load_best_model_at_end"))
    table.pass_over("compute_accuracy", "greater_is_better")


def _rest(table: Table, draft: Draft) -> None:
    draft.carry(table, "output_dir", "work_dir")
    if table.take("use_cpu", False):
        draft.set("device", "cpu", table.line_of("use_cpu"))
    report, line = table.take("report_to"), table.line_of("report_to")
    names = _split(report)
    trackers = [name for name in names if name in TRACKERS]
    if trackers and trackers != ["tensorboard"]:
        draft.set("report_to", trackers, line)
    if set(names) - {"none", *TRACKERS}:
        draft.lose(line, shown("report_to", report), f"name any of {', '.join(TRACKERS)}")
    for key, name, value in (
        ("resize_vocab", "resize_embeddings", True),
        ("disable_shuffling", "shuffle", False),
    ):
        if table.take(key, False):
            draft.set(name, value, table.line_of(key))
    if table.take("use_muon", False):
        draft.set("optim_type", "Muon", table.line_of("use_muon"))
    if alpha := table.take("neftune_noise_alpha"):
        draft.set("neftune_noise_alpha", float(alpha), table.line_of("neftune_noise_alpha"))
    if table.take("trust_remote_code"):
        draft.note(
            table.line_of("trust_remote_code"),
            "trust_remote_code: true",
            "stays False; if the model needs remote code, training reports it",
        )
    refuse_set(table, draft, _CHANGES)
    lose_set(table, draft, _SHARDING)
    table.pass_over(*_NO_INFLUENCE)
    lose_rest(table, draft)


def _split(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [part.strip() for part in str(value).split(",")] if value else []
