"""Packed rows against one sample at a time, and what `verify` rejects."""

import contextlib
from dataclasses import replace

import pytest
import torch
from losses import loss_of
from torch.nn import functional as F
from trainer_parts import random_batch

from xtuner.config.schema import Settings
from xtuner.errors import ModelError
from xtuner.kernels import compiled
from xtuner.kernels.attention import packed as attention
from xtuner.kernels.fused import attention as fused_attention
from xtuner.kernels.fused import norm_mlp
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.load import load_model
from xtuner.models.prepare import make_trainable
from xtuner.testing.tiny import tiny_model, tiny_model_folder
from xtuner.types import IGNORE_INDEX

LENGTHS = (9, 4, 12)
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
    "mixtral": {},
    "cohere": {},
}


def plain_loss(model, batch):
    """Each sample separately through transformers, with all logits in memory."""
    total = 0.0
    for sample in batch.split():
        logits = model(input_ids=sample.input_ids, use_cache=False).logits[0, :-1].float()
        labels = sample.labels[0, 1:]
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model, loss, expected):
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert (gradient - expected[name]).abs().max() < 1e-4 * scale, name


CHANGED = {"llama": 2, "qwen2": 2, "qwen3": 2, "mistral": 2, "mixtral": 2, "gemma3_text": 2}
"""Attention layers that are rotated, laid out and multiplied in one operation on a CPU."""


@pytest.mark.parametrize("implementation", [attention.NAME, "sdpa", "eager", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_one_by_one(architecture, implementation):
    if architecture == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers' sdpa has no soft cap")
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    batch = random_batch(*LENGTHS)
    model.set_attn_implementation("eager")
    expected_loss = plain_loss(model, batch)
    expected = gradients(model, expected_loss)
    attention.register()
    fused = implementation == "fused"
    model.set_attn_implementation(attention.NAME if fused else implementation)
    if fused:
        norm_mlp.install(model)
        changed = fused_attention.install(model)
        assert changed == (CHANGED.get(architecture, 0) if compiled.available() else 0)
    packed = PackedCausalLM(model)
    packed.verify()
    loss = loss_of(packed, batch)
    assert abs(loss.item() - expected_loss.item()) < 1e-5 * expected_loss.item()
    assert_gradients(model, loss, expected)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_full_fine_tuning_in_bfloat16_with_norms_of_heads_equals_the_plain_path(head_dim):
    """Under autocast a norm with float32 weights gives float32 while values are bfloat16."""
    batch, found = random_batch(*LENGTHS), []
    for fused in (False, True):
        model = tiny_model("qwen3", head_dim=head_dim)
        model.set_attn_implementation(attention.register())
        if fused:
            changed = fused_attention.install(model)
            assert changed == (2 if compiled.available() else 0)
        packed = PackedCausalLM(model, autocast=torch.bfloat16)
        packed.verify()
        loss = loss_of(packed, batch)
        found.append((loss.item(), gradients(model, loss)))
    (wanted, exact), (got, ours) = found
    assert abs(got - wanted) < 1e-3 * wanted
    for name, gradient in ours.items():
        assert (gradient - exact[name]).norm() < 0.02 * exact[name].norm().clamp(min=1e-2), name


def test_fused_attention_leaves_cache_masks_and_dropout_to_the_model():
    model = tiny_model(attention_dropout=0.5)
    model.set_attn_implementation(attention.register())
    batch = random_batch(*LENGTHS)
    ids = batch.input_ids[:, :9]
    with torch.no_grad():
        wanted = tiny_model().eval()(input_ids=ids).logits
        fused_attention.install(model)
        model.train()
        torch.manual_seed(0)
        first = model.base_model(**PackedCausalLM(model).inputs_of(batch)).last_hidden_state
        second = model.base_model(**PackedCausalLM(model).inputs_of(batch)).last_hidden_state
        assert not torch.equal(first, second)  # dropout is the model's own
        model.set_attn_implementation("sdpa")
        assert torch.allclose(model.eval()(input_ids=ids).logits, wanted, atol=1e-5)
        grown = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert grown.shape == (1, 13)


def test_recomputed_activations_give_the_same_gradients():
    model = tiny_model()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    packed = PackedCausalLM(model.train())
    straight = gradients(model, loss_of(packed, random_batch(*LENGTHS)))
    model.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(model, loss_of(packed, random_batch(*LENGTHS)))
    assert all(torch.equal(straight[name], recomputed[name]) for name in straight)


def test_a_step_reads_no_value_back_from_the_device(monkeypatch):
    """On a GPU the CPU would wait for it; here a device without values, where reading is an error,
    stands in."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = tiny_model().to("meta")
    model.set_attn_implementation(attention.register())
    batch = random_batch(*LENGTHS).to("meta")
    with pytest.warns(UserWarning, match="one sample at a time"):
        loss_of(PackedCausalLM(model.train()), batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_labels_that_were_changed_after_the_move_count():
    batch = random_batch(*LENGTHS).to("cpu")
    changed = replace(batch, labels=batch.labels.clone())
    changed.labels[0, 3:] = -100
    assert batch.predicting.tolist() == random_batch(*LENGTHS).predicting.tolist()
    assert changed.predicting.tolist() == [i for i in batch.predicting.tolist() if i < 2]


def test_split_gives_the_parts_back():
    batch = random_batch(*LENGTHS)
    parts = batch.split()
    assert [part.num_tokens for part in parts] == list(LENGTHS)
    assert torch.equal(torch.cat([p.input_ids for p in parts], 1), batch.input_ids)
    assert sum(part.num_supervised for part in parts) == batch.num_supervised
    assert all(part.cu_seqlens.tolist() == [0, part.num_tokens] for part in parts)


def test_a_leaking_attention_is_refused():
    def leaking(module, query, key, value, attention_mask, **kwargs):
        kwargs["cu_seq_lens_q"] = torch.tensor([0, query.shape[2]])
        return attention.packed_attention(module, query, key, value, None, **kwargs)

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("leaking", leaking)
    AttentionMaskInterface.register("leaking", lambda *a, **k: None)
    model = tiny_model()
    model.set_attn_implementation("leaking")
    with pytest.raises(ModelError, match="neighbours"):
        PackedCausalLM(model).verify()


def test_attention_without_cu_seqlens_is_an_error():
    model = tiny_model()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ModelError, match="its cu_seqlens"):
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)


def test_a_soft_cap_on_logits_is_not_lost():
    model = tiny_model("gemma2", final_logit_softcapping=0.05)
    packed = PackedCausalLM(model)
    model.set_attn_implementation("eager")
    assert "changes its logits" in packed.verify()
    batch = random_batch(*LENGTHS)
    batch = replace(batch, labels=batch.labels)
    assert abs(loss_of(packed, batch).item() - plain_loss(model, batch).item()) < 1e-3


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    model = tiny_model()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    exact = loss_of(PackedCausalLM(model), random_batch(*LENGTHS))
    rough = loss_of(PackedCausalLM(model, autocast=torch.bfloat16), random_batch(*LENGTHS))
    assert exact.item() != rough.item()
    assert abs(rough.item() - exact.item()) < 0.01 * exact.item()
    assert all(g.dtype == torch.float32 for g in gradients(model, rough).values())


def test_a_large_number_of_a_neighbour_is_no_leak_in_layers_of_8_bits(tmp_path):
    """LLM.int8() rounds a column differently for all tokens if one token has an outlier in it."""
    model = tiny_model(hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.3)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.fill_(4.0)  # its results reach 6, as in real models
    model.save_pretrained(tmp_path)
    packed = PackedCausalLM(load_model(tmp_path, dtype=torch.float32, quantization="int8"))
    threshold = packed.model.model.layers[0].self_attn.q_proj.state.threshold
    assert packed.verify() is None
    assert threshold > 0
    assert packed.model.model.layers[0].self_attn.q_proj.state.threshold == threshold


def test_a_model_that_overflows_in_float16_is_refused_and_not_called_leaking():
    attention.register()
    model = tiny_model().half()
    model.set_attn_implementation(attention.NAME)
    assert PackedCausalLM(model).verify() is None
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight.data *= 100
    mlp.up_proj.weight.data *= 100
    mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(ModelError, match=r"not finite.*float16 overflows above 65,504"):
        PackedCausalLM(model).verify()


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_the_type_of_products_is_not_that_of_adapters(tmp_path, tuning):
    """With the embedding on the CPU, the first parameter of a QLoRA model is an adapter."""
    tiny_model_folder(tmp_path, "llama")
    s = Settings(pretrained_model_name_or_path=str(tmp_path), data_path="none.json", tuning=tuning)
    options = {"dtype": torch.bfloat16, "device": "cpu", "recompute": False}
    model = PackedCausalLM(make_trainable(s, **options, embedding_on_cpu=True))
    assert model.compute_dtype == torch.bfloat16
    assert PackedCausalLM(tiny_model("llama")).compute_dtype == torch.float32
    assert (
        PackedCausalLM(tiny_model("llama"), autocast=torch.float16).compute_dtype == torch.float16
    )
