"""A tiny configuration of any causal architecture of transformers.

Sizes are set by the names that configurations share; kinds of layers that a model mixes are all
kept, one layer of each.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_WIDTHS = {
    32: "hidden_size d_model n_embd dim embedding_size embed_dim emb_dim word_embed_proj_dim "
    "dim_model lru_width attention_hidden_size project_dim moe_intermediate_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "hidden_size_global adapter_in_dim adapter_out_dim",
    64: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "dim_ff mamba_d_ssm intermediate_size_mlp",
    8: "head_dim dim_head d_head qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_head "
    "mamba_head_dim mamba_d_state ssm_state_size state_size mamba_n_heads mamba_num_heads "
    "mamba_chunk_size chunk_size block_size linear_key_head_dim linear_value_head_dim "
    "global_head_dim kv_channels hidden_size_per_layer_input index_topk",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "linear_num_value_heads rotary_dim mamba_dt_rank time_step_rank local_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks "
    "num_key_value_heads num_global_key_value_heads linear_num_key_heads num_experts_per_tok "
    "moe_k moe_top_k top_k_experts moe_topk n_mamba_heads index_n_heads num_experts_per_token "
    "pad_token_id",
    1: "n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups "
    "bos_token_id",
    0: "num_kv_shared_layers zero_expert_num router_jitter_noise input_jitter_noise",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    16: "sliding_window attention_window window_size q_lora_rank kv_lora_rank index_head_dim",
    261: "vocab_size vocab_size_per_layer_input",
}
_SIZES = {name: size for size, names in _WIDTHS.items() for name in names.split()}
_SIZES["eos_token_id"] = 4
_OPTIONAL = ("sliding_window", "vocab_size", "q_lora_rank", "pad_token_id")
"""Fields that mean something where they are None."""
_MISSING = object()
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bert": {"is_decoder": True},
    "blt": {"encoder_hash_byte_group_vocab": 261, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"]},
    "roberta": {"is_decoder": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {
        "use_expert_bias": False,
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
    },
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"], "is_decoder": True},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> Any:
    """The configuration of `model_type` with few layers of width 32, without dropout.

    Raises:
        Exception: Raised by transformers for sizes that do not fit each other.
    """
    own = _OWN.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**_changes(AutoConfig.for_model(model_type)), **own})


def _changes(config: Any) -> dict[str, Any]:
    """The fields of `config` to set, and those of the configurations inside."""
    kind, changed = type(config), dict[str, Any]()
    for name, size in _SIZES.items():
        value = _value(config, name)
        fixed = isinstance(getattr(kind, name, None), property) or name in kind.attribute_map
        if fixed or value is _MISSING or isinstance(value, bool):
            continue
        if value is None and name not in _OPTIONAL:
            changed[name] = size
        elif isinstance(value, int | float):
            changed[name] = type(value)(size)
    for name in vars(config):
        value = _value(config, name)
        if ("dropout" in name or name.endswith("_pdrop")) and type(value) in (int, float):
            changed[name] = type(value)(0)
    changed |= _layers(config, kind)
    if "kv_lora_rank" in changed:
        changed["num_key_value_heads"] = 4
    for name in kind.sub_configs:
        inner = _value(config, name)
        if inner is not None and inner is not _MISSING:
            own = _OWN.get(inner.model_type, {})
            changed[name] = {**_changes(inner), **own, "model_type": inner.model_type}
    return changed


def _layers(config: Any, kind: Any) -> dict[str, Any]:
    """One layer of each kind that `config` has."""
    for name in ("layer_types", "layers_block_type"):
        kinds = _value(config, name)
        fixed = isinstance(getattr(kind, name, None), property) or name in kind.attribute_map
        if fixed or not isinstance(kinds, list | tuple):
            continue
        if kinds and all(isinstance(each, str) for each in kinds):
            distinct = list(dict.fromkeys(kinds))
            distinct = distinct if len(distinct) > 1 else distinct * 2
            return {name: distinct, "num_hidden_layers": len(distinct)}
    return {}


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, _MISSING)
    except Exception:  # some fields differ by layer, and refuse to be read as one
        return _MISSING
