"""Adapters trained on InternLM2's own code, with its fused and grouped ``wqkv``."""

import json

import pytest
import torch
from families.test_internlm2 import IDS, make_llama, write_original
from safetensors.torch import load_file, save_file

from xtuner.convert.merge import merge
from xtuner.models.adapters import load_adapter
from xtuner.models.families import internlm2
from xtuner.models.load import load_model
from xtuner.testing.tiny import tiny_tokenizer

LAYERS = ("attention.wqkv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3)))


def write_old_adapter(folder, weights, **config):
    """An adapter with random weights for every layer of `weights`, in xtuner 0.1's format."""
    generator = torch.Generator().manual_seed(3)
    tensors, wanted = {}, dict(weights)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith((*LAYERS, "output")):
            continue
        rows, columns = weight.shape
        down = torch.randn(4, columns, generator=generator) * 0.2
        up = torch.randn(rows, 4, generator=generator) * 0.2
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
        alpha = config.get("alpha_pattern", {}).get(layer.rpartition(".")[2], 8)
        wanted[name] = weight + alpha / 4 * up @ down
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.05, "target_modules": ["wqkv", "wo", "w1", "w2", "w3", "output"],
        "bias": "none", "fan_in_fan_out": False, "base_model_name_or_path": "internlm2", **config,
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return tensors, wanted


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("config", [{}, {"alpha_pattern": {"wqkv": 2, "w2": 16}}])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_on_fused_weights_does_the_same(tmp_path, kv_heads, config, pickled):
    internlm2.register()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_original(
        base, make_llama(kv_heads=kv_heads, bias=True, rope_scaling=None), rope_scaling=None
    )
    tiny_tokenizer().save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    tensors, wanted = write_old_adapter(adapter, weights, **config)
    if pickled:
        torch.save(tensors, adapter / "adapter_model.bin")
    else:
        save_file(tensors, adapter / "adapter_model.safetensors")

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=IDS, use_cache=False).logits

    found = logits(load_adapter(load_model(base, dtype=torch.float32), adapter))
    merge(base, adapter, tmp_path / "merged", log=lambda line: None)
    save_file(wanted, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(load_model(base, dtype=torch.float32))
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(
        logits(load_model(tmp_path / "merged", dtype=torch.float32)), expected, atol=1e-4
    )
