"""Translate the model of an old config: model, quantization, adapters and tokenizer."""

from __future__ import annotations

from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, use_all, written

_LORA_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
_FURTHER = (
    "use_rslora",
    "use_dora",
    "bias",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields of LoraConfig that `lora_config` takes as they are."""
_PLAIN_LORA: tuple[Any, ...] = (None, False, "none", 0, [], {})
_CAUSAL = ("AutoModelForCausalLM", "ForCausalLM")
_ATTENTION = (
    "attn_implementation", "_attn_implementation", "use_flash_attention_2", "use_cache",
    "device_map", "low_cpu_mem_usage",
)  # fmt: skip


def read(config: Table, draft: Draft) -> None:
    """Translate ``model`` and ``tokenizer``."""
    model = config.table("model")
    kind = model.last()
    if kind not in ("SupervisedFinetune", "LLaVAModel"):
        draft.refuse(
            model.line_of("type"),
            shown("model.type", model.get("type")),
            "only SupervisedFinetune and LLaVAModel are supported",
        )
        return
    model.pass_over("use_varlen_attn", "use_activation_checkpointing")
    read_language_model(model.table("llm"), draft)
    if kind == "LLaVAModel":
        _vision(model, draft)
    read_adapter(model.optional("llm_lora" if kind == "LLaVAModel" else "lora"), model, draft)
    _rest_of_model(model, draft)
    read_tokenizer(config, draft)


def read_language_model(llm: Table, draft: Draft) -> None:
    """Translate the pretrained model, its dtype and its quantization."""
    if not llm.last().endswith(_CAUSAL) or not llm.name().endswith("from_pretrained"):
        draft.refuse(
            llm.line_of("type"), shown("llm.type", llm.get("type")), "is not a pretrained LLM"
        )
    path = llm.take("pretrained_model_name_or_path")
    line = llm.line_of("pretrained_model_name_or_path")
    draft.set("pretrained_model_name_or_path", path, line)
    llm.pass_over(*_ATTENTION, "moe_implementation", "expert_in_one_shard")
    if llm.take("trust_remote_code"):
        draft.note(
            llm.line_of("trust_remote_code"),
            "trust_remote_code = True",
            "stays False: models that transformers supports need no remote code; if this model "
            "does, training reports it",
        )
    _number_type(llm, draft)
    _quantization(llm, draft)


def _number_type(llm: Table, draft: Draft) -> None:
    name = llm.last("torch_dtype") or llm.last("dtype")
    if name in ("float16", "half"):
        draft.note(
            llm.line_of("torch_dtype"),
            "torch.float16",
            "dtype = 'auto' uses bfloat16 if the hardware supports it, else float32",
        )
    elif name in ("bfloat16", "float32"):
        draft.set("dtype", name, llm.line_of("torch_dtype"))


def _quantization(llm: Table, draft: Draft) -> None:
    bits, line = llm.table("quantization_config"), llm.line_of("quantization_config")
    if bits and bits.last() != "BitsAndBytesConfig":
        draft.refuse(line, shown("quantization_config", bits.get("type")), "is not supported")
    int8 = bits.take("load_in_8bit") or llm.take("load_in_8bit")
    if bits.take("load_in_4bit") or llm.take("load_in_4bit"):
        draft.set("quantization", bits.take("bnb_4bit_quant_type", "fp4"), line)
        double = bool(bits.take("bnb_4bit_use_double_quant", False))
        draft.set("double_quant", double, bits.line_of("bnb_4bit_use_double_quant"))
        bits.pass_over("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold")
        bits.pass_over("llm_int8_has_fp16_weight")
        return
    if int8:
        draft.set("quantization", "int8", line)
        threshold = bits.take("llm_int8_threshold", 6.0)
        if threshold != 6.0:
            draft.lose(line, f"llm_int8_threshold = {threshold}", "the threshold is always 6.0")
    use_all(bits)


def read_adapter(lora: Table | None, model: Table, draft: Draft) -> None:
    """Translate the adapter and set `tuning`."""
    quantized = draft.values.get("quantization", "none") != "none"
    if lora is None:
        draft.set("tuning", "full", model.line)
        frozen = draft.values.get("freeze_llm") and "visual_encoder_name_or_path" in draft.values
        if quantized and not frozen:
            draft.refuse(
                draft.lines["quantization"], "quantization_config", "quantized weights need lora"
            )
        return
    draft.set("tuning", "qlora" if quantized else "lora", lora.line)
    for old, default in _LORA_DEFAULTS.items():
        draft.carry(lora, old, _ours(old), default)
    _targets(lora, draft)
    further = {key: lora.take(key) for key in _FURTHER if lora.get(key) not in _PLAIN_LORA}
    if further:
        draft.set("lora_config", further, lora.line_of(next(iter(further))))
    _refuse_variants(lora, draft)


def _targets(lora: Table, draft: Draft) -> None:
    targets = lora.take("target_modules")
    if isinstance(targets, list | tuple):
        draft.set("lora_target_modules", list(targets), lora.line_of("target_modules"))
    elif targets not in (None, "all-linear"):
        draft.refuse(
            lora.line_of("target_modules"),
            shown("target_modules", targets),
            "patterns are not supported; list the names",
        )
    if saved := lora.take("modules_to_save"):
        draft.set("lora_modules_to_save", list(saved), lora.line_of("modules_to_save"))


def _refuse_variants(lora: Table, draft: Draft) -> None:
    if lora.last() != "LoraConfig":
        draft.refuse(lora.line_of("type"), shown("type", lora.get("type")), "is not LoraConfig")
    lora.pass_over("type", "task_type", "inference_mode", "peft_type")
    for key, value in lora.items():
        if key not in lora.used and value not in _PLAIN_LORA:
            lora.pass_over(key)
            draft.refuse(lora.line_of(key), shown(f"lora.{key}", value), "is not supported")
        lora.pass_over(key)


def _vision(model: Table, draft: Draft) -> None:
    encoder = model.table("visual_encoder")
    encoder.pass_over("type", "torch_dtype", "trust_remote_code")
    name, line = encoder.take("pretrained_model_name_or_path"), model.line_of("visual_encoder")
    draft.set("visual_encoder_name_or_path", name, line)
    for key in ("freeze_llm", "freeze_visual_encoder"):
        draft.set(key, bool(model.take(key, False)), model.line_of(key))
    layer = model.take("visual_select_layer", -2)
    if layer != -2:
        draft.set("visual_select_layer", layer, model.line_of("visual_select_layer"))
    depth = model.take("projector_depth", 2)
    if depth != 2:
        line = model.line_of("projector_depth")
        draft.refuse(line, f"projector_depth = {depth}", "the projector always has two layers")
    draft.carry(model, "pretrained_pth", "pretrained_pth")
    lora = model.optional("visual_encoder_lora")
    if lora is not None:
        for old, default in _LORA_DEFAULTS.items():
            draft.carry(lora, old, f"visual_encoder_{_ours(old)}", default)
        if lora.take("target_modules") is not None:
            line = lora.line_of("target_modules")
            draft.refuse(
                line, "visual_encoder_lora.target_modules", "all linear layers get adapters"
            )
        _refuse_variants(lora, draft)


def _ours(name: str) -> str:
    return f"lora_{name.removeprefix('lora_')}"


def _rest_of_model(model: Table, draft: Draft) -> None:
    for key, reason in (
        ("max_position_embeddings", "extending the context length is not supported"),
        ("peft_model", "starting from an adapter is not supported; merge it into the model first"),
        ("data_preprocessor", "is not supported"),
        ("init_cfg", "is not supported"),
    ):
        value = model.take(key)
        if value is not None:
            draft.refuse(model.line_of(key), shown(f"model.{key}", value), reason)
    if model.take("tokenizer") is not None:
        draft.note(
            model.line_of("tokenizer"),
            "model.tokenizer",
            "the embedding is never resized: the tokenizer must match the model",
        )


def read_tokenizer(config: Table, draft: Draft) -> None:
    """Check that ``tokenizer`` is the tokenizer of the model."""
    check_tokenizer(config.table("tokenizer"), draft)


def check_tokenizer(tokenizer: Table, draft: Draft) -> None:
    """Report a tokenizer that is not the tokenizer of the model."""
    tokenizer.pass_over("type", "trust_remote_code", "padding_side", "use_fast")
    tokenizer.pass_over("eos_token", "encode_special_tokens")
    path = tokenizer.take("pretrained_model_name_or_path")
    line = tokenizer.line_of("pretrained_model_name_or_path")
    model = draft.values.get("pretrained_model_name_or_path")
    if path is not None and path != model:
        draft.refuse(
            line,
            f"tokenizer = {written(path)}",
            f"the tokenizer is always loaded from the model ({model}); put both into one folder",
        )
