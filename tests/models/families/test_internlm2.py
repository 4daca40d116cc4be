"""InternLM2 checkpoints in the original layout, made by hand from a random Llama."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xtuner.models.families import internlm, internlm2

HEADS, HEAD_DIM = 4, 8
IDS = torch.tensor([[5, 17, 200, 3, 42, 99, 7, 7, 12]])
NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    internlm2.register()
    internlm.register()


def make_llama(*, kv_heads: int, bias: bool, rope_scaling: dict | None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        attention_bias=bias,
        max_position_embeddings=8 if rope_scaling else 64,
        rope_parameters={
            "rope_theta": 1e6,
            "rope_type": (rope_scaling or {}).get("type", "default"),
            **({"factor": rope_scaling["factor"]} if rope_scaling else {}),
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def fuse(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """The layout by its definition: for each kv head its queries, its key, its value."""
    group = HEADS // kv_heads * HEAD_DIM
    rows = []
    for head in range(kv_heads):
        rows += [q[head * group : (head + 1) * group]]
        rows += [
            k[head * HEAD_DIM : (head + 1) * HEAD_DIM],
            v[head * HEAD_DIM : (head + 1) * HEAD_DIM],
        ]
    return torch.cat(rows)


def write_original(
    folder: Path, llama: LlamaForCausalLM, *, rope_scaling: dict | None
) -> dict[str, Tensor]:
    config = llama.config
    tensors: dict[str, Tensor] = {}
    state = llama.state_dict()
    for name, tensor in state.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            qkv = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name = name.replace("self_attn.q_proj", "attention.wqkv")
            tensors[name] = fuse(*qkv, config.num_key_value_heads)
            continue
        for new, old in NAMES.items():
            name = name.replace(new, old)
        tensors[name] = tensor.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "model_type": "internlm2",
        "bias": config.attention_bias,
        "rope_theta": 1000000,
        "rope_scaling": rope_scaling,
        "torch_dtype": "float32",
    }
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
    ):
        values[key] = getattr(config, key)
    for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        values[key] = getattr(config, key)
    (folder / "config.json").write_text(json.dumps(values))
    return tensors


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("kv_heads", "bias", "rope_scaling"),
    [
        (1, False, None),
        (2, True, {"type": "dynamic", "factor": 2.0}),
        (4, True, None),
        (2, False, {"type": "linear", "factor": 3.0}),
    ],
)
def test_loads_as_llama_and_saves_back_bit_equal(
    tmp_path: Path, kv_heads: int, bias: bool, rope_scaling: dict | None
) -> None:
    llama = make_llama(kv_heads=kv_heads, bias=bias, rope_scaling=rope_scaling)
    original = write_original(tmp_path / "original", llama, rope_scaling=rope_scaling)

    model = load(tmp_path / "original")
    torch.testing.assert_close(logits(model), logits(llama), rtol=0, atol=0)

    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], original[name]) for name in original)

    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bias"], config["rope_theta"], config["rope_scaling"]) == (
        bias,
        1e6,
        rope_scaling,
    )
    assert "auto_map" not in config and config["model_type"] == "internlm2"
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(llama), rtol=0, atol=0)


def test_a_model_made_from_its_config_saves_the_original_layout(tmp_path: Path) -> None:
    config = internlm2.InternLM2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.attention.wqkv.bias" in names and "output.weight" in names


def test_llama_layout_on_request(tmp_path: Path) -> None:
    llama = make_llama(kv_heads=2, bias=True, rope_scaling=None)
    write_original(tmp_path / "original", llama, rope_scaling=None)
    load(tmp_path / "original").save_pretrained(tmp_path / "llama", save_original_format=False)
    saved = load_file(tmp_path / "llama" / "model.safetensors")
    assert saved.keys() == llama.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in llama.state_dict().items())
    torch.testing.assert_close(logits(load(tmp_path / "llama")), logits(llama), rtol=0, atol=0)


def test_adapters_save_load_and_merge(tmp_path: Path) -> None:
    llama = make_llama(kv_heads=2, bias=True, rope_scaling=None)
    write_original(tmp_path / "original", llama, rope_scaling=None)
    adapted = get_peft_model(
        load(tmp_path / "original"),
        LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    ).eval()
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(llama))
    adapted.save_pretrained(tmp_path / "adapter")

    reloaded = PeftModel.from_pretrained(load(tmp_path / "original"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=0)

    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert "output.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_internlm_1_is_llama_with_biases(tmp_path: Path) -> None:
    llama = make_llama(kv_heads=4, bias=True, rope_scaling=None)
    llama.save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    del config["attention_bias"]
    path.write_text(json.dumps({**config, "model_type": "internlm", "bias": True}))
    model = load(tmp_path / "one")
    torch.testing.assert_close(logits(model), logits(llama), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["bias"] is True
    torch.testing.assert_close(logits(load(tmp_path / "two")), logits(llama), rtol=0, atol=0)
