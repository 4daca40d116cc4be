"""Our LoRA forward pass against PEFT's, on plain and on quantised weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner.convert.merge import merge
from xtuner.errors import ConfigError, LaunchError, ModelError
from xtuner.models.adapters import (
    add_adapter,
    count_parameters,
    load_adapter,
    load_adapter_weights,
    notes_on_adapters,
)
from xtuner.models.load import load_model
from xtuner.models.save import save_model
from xtuner.models.text_path import freeze_outside_text, note_on_frozen
from xtuner.testing.architectures import tiny_config
from xtuner.testing.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(5, 45)[None]


def adapted(model, **options):
    model = add_adapter(model, **{"r": 4, "alpha": 8, "seed": 3, **options})
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: give every adapter an effect
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def loss_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def with_peft_forward(monkeypatch):
    from xtuner.models import adapters

    monkeypatch.setattr(adapters, "layer_classes", dict)


def test_equals_peft_in_float32(monkeypatch):
    ours = loss_and_gradients(adapted(tiny_model()))
    with_peft_forward(monkeypatch)
    theirs = loss_and_gradients(adapted(tiny_model()))
    assert abs(ours[0] - theirs[0]) < 1e-6
    assert ours[1].keys() == theirs[1].keys()
    assert all((ours[1][n] - theirs[1][n]).abs().max() < 1e-6 for n in ours[1])


def test_bfloat16_weights_get_float32_adapters_and_close_gradients():
    exact = loss_and_gradients(adapted(tiny_model()))[1]
    model = adapted(tiny_model().bfloat16())
    rough = loss_and_gradients(model)[1]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_gradients_equal_those_of_the_dequantised_model(quantization, tmp_path):
    """Also after a forward pass in evaluation mode, which used to repack 4-bit
    weights."""
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    base = load_model(tmp_path, dtype=torch.float32, quantization=quantization)
    base.eval()
    with torch.no_grad():
        before = base(input_ids=IDS, use_cache=False).logits
    quantised = adapted(base).train()
    reference = load_model(tmp_path, dtype=torch.float32, quantization=quantization).dequantize()
    reference.eval()
    with torch.no_grad():
        plain = reference(input_ids=IDS, use_cache=False).logits
    tolerance = 1e-4 if quantization != "int8" else 2e-2  # int8 rounds activations as well
    assert (before - plain).abs().max() < tolerance * plain.abs().max()
    found = loss_and_gradients(quantised)[1]
    expected = loss_and_gradients(adapted(reference).train())[1]
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= (tolerance * 10) * expected[
            name
        ].norm() + 1e-7, name


def test_the_seed_fixes_the_adapters_and_spares_the_global_state():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = dict(add_adapter(tiny_model(), r=4, alpha=8, seed=1).named_parameters())
    assert torch.equal(torch.rand(3), wanted)
    second = dict(add_adapter(tiny_model(), r=4, alpha=8, seed=1).named_parameters())
    other = dict(add_adapter(tiny_model(), r=4, alpha=8, seed=2).named_parameters())
    name = next(n for n in first if "lora_A" in n)
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model = adapted(tiny_model().bfloat16())
    save_model(model, tmp_path)
    fresh = add_adapter(tiny_model().bfloat16(), r=4, alpha=8, seed=9)
    load_adapter_weights(fresh, tmp_path)
    before, after = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before
    )


def test_all_linear_leaves_the_head_out():
    names = [n for n, p in adapted(tiny_model()).named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2 and not any("lm_head" in n for n in names)


def test_an_unknown_layer_is_named():
    with pytest.raises(ModelError, match=r"'qproj'.*q_proj"):
        add_adapter(tiny_model(), r=4, alpha=8, target_modules=["qproj"])


def test_count_of_quantised_weights_is_that_of_the_unpacked(tmp_path):
    tiny_model(hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    plain = count_parameters(load_model(tmp_path, dtype=torch.float32))[1]
    packed = count_parameters(load_model(tmp_path, dtype=torch.float32, quantization="nf4"))[1]
    assert plain == packed


def test_router_that_returns_a_tuple_gets_no_adapter_and_experts_are_noted():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = adapted(tiny_model("phimoe", **sizes))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and not any("router" in name or "gate" in name for name in names)
    loss, gradients = loss_and_gradients(model)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    router, experts = notes_on_adapters(model)
    assert (
        router == "2 linear layers get no adapter: a PhimoeTopKRouter does more than a linear layer"
    )
    assert "of the weights are experts in three-dimensional tensors" in experts


@pytest.mark.parametrize(
    ("kind", "layer", "gets_one"),
    [("falcon", "query_key_value", True), ("deepseek_v4", "o_a_proj", False)],
)
def test_layer_of_its_own_class_gets_an_adapter_if_it_computes_what_a_linear_layer_does(
    kind, layer, gets_one
):
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    for built in (model, on_meta):
        made = add_adapter(built, r=4, alpha=8, seed=3)
        names = [name for name, _ in made.named_parameters() if "lora_A" in name]
        assert any(f".{layer}." in name for name in names) is gets_one and len(names) > 4
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


def test_filters_of_convolutions_are_no_experts():
    model = AutoModelForCausalLM.from_config(tiny_config("mamba"), dtype=torch.float32)
    model = add_adapter(model, r=4, alpha=8)
    assert not [note for note in notes_on_adapters(model) if "experts" in note]


def gemma3_for_images():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]], ids=["all", "named"])
def test_parts_for_images_get_no_adapter(targets):
    model = add_adapter(gemma3_for_images(), r=4, alpha=8, target_modules=targets)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and all("language_model" in name for name in names)
    (note,) = notes_on_adapters(model)
    assert note.endswith("linear layers get no adapter: not reached by text")


def test_layer_that_text_does_not_reach_is_not_saved_with_its_namesakes(tmp_path):
    gemma3_for_images().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    first, second, third = (load_model(tmp_path / "base", dtype=torch.float32) for _ in range(3))
    names = {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}
    model = add_adapter(first, r=4, alpha=8, **names)
    saved = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    name = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.modules_to_save"
    assert saved == {f"{name.format(layer)}.default.weight" for layer in (0, 1)}
    adapters, layers = notes_on_adapters(model)
    assert adapters == "1 linear layer gets no adapter: not reached by text"
    assert layers == (
        "lora_modules_to_save: 1 layer with such a name stays frozen: not reached by text"
    )
    for parameter in model.parameters():
        parameter.data += 0.02 * parameter.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        resumed = add_adapter(third, r=4, alpha=8, **names)
        load_adapter_weights(resumed, tmp_path / "adapter")
        assert torch.equal(resumed(input_ids=IDS, use_cache=False).logits, expected)
        loaded = load_adapter(second, tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=IDS, use_cache=False).logits, expected)
        merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
        merged = load_model(tmp_path / "merged", dtype=torch.float32)
        assert torch.allclose(merged(input_ids=IDS, use_cache=False).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "saved", "words"),
    [
        (["layers.9.q_proj", "v_proj"], [], "no layer 'layers.9.q_proj'; its linear"),
        (["q_proj"], ["layers.9.mlp"], "no layer 'layers.9.mlp'"),
        (["q_proj"], [""], "no layer ''"),
        (["q_proj", "mlp"], [], "'mlp' is a LlamaMLP, which cannot get an adapter; name linear"),
        (["norm"], [], "'norm' is a LlamaRMSNorm, which cannot get an adapter"),
        (["q_proj"], ["self_attn"], "lora_modules_to_save trains all of these layers completely"),
        (["all-linear"], ["model"], "PEFT refuses them: .*No modules were targeted"),
    ],
    ids=["target", "saved", "empty", "block", "norm", "both", "everything"],
)
def test_names_that_peft_would_ignore_or_refuse_are_named(targets, saved, words):
    with pytest.raises(ModelError, match=words):
        add_adapter(tiny_model(), r=4, alpha=8, target_modules=targets, modules_to_save=saved)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"), MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ImportError("no module named 'gptqmodel'"), LaunchError("no disk space"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_errors_that_settings_of_adapters_do_not_cause_are_not_peft_s(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("peft.get_peft_model", fail)
    with pytest.raises(type(error)) as caught:
        add_adapter(tiny_model(), r=4, alpha=8)
    assert caught.value is error
    if isinstance(error, ImportError):
        with pytest.raises(ConfigError, match=r"lora_config = .*no module named 'gptqmodel'"):
            add_adapter(tiny_model(), r=4, alpha=8, further={"use_rslora": True})


def test_parts_for_images_are_not_trained_instead_of_text():
    with pytest.raises(ModelError, match=r"'fc1' only names parts for images.*vision_tower"):
        add_adapter(gemma3_for_images(), r=4, alpha=8, target_modules=["q_proj", "fc1"])
    with pytest.raises(ModelError, match=r"no layer 'fc3'; .* are down_proj, gate_proj, k_proj"):
        add_adapter(gemma3_for_images(), r=4, alpha=8, target_modules=["fc3"])
    with pytest.raises(ModelError, match="'mlp' is a Gemma3MLP, which cannot get"):
        add_adapter(gemma3_for_images(), r=4, alpha=8, target_modules=["mlp"])
    with pytest.raises(ModelError, match="'multi_modal_projector' only names"):
        add_adapter(gemma3_for_images(), r=4, alpha=8, modules_to_save=["multi_modal_projector"])
    model = gemma3_for_images()
    all_of_it = sum(p.numel() for p in model.parameters())
    freeze_outside_text(model)
    left = all_of_it - sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert note_on_frozen(model) == f"{left:,} weights are frozen: not reached by text"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in name or "lm_head" in name for name in trained)


def test_an_adapter_of_another_shape_is_refused_with_the_whole_reason(tmp_path):
    adapted(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_adapter(tiny_model(hidden_size=64, head_dim=16), tmp_path)
    told = str(caught.value)
    assert "the adapter does not fit the model" in told and "\n" not in told
    assert "size mismatch for" in told and "torch.Size([4, 32])" in told


def test_layer_of_mamba_that_peft_refuses_is_named_if_it_is_asked_for():
    model = AutoModelForCausalLM.from_config(tiny_config("mamba"), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"PEFT refuses them: .*out_proj"):
        add_adapter(model, r=4, alpha=8, target_modules=["in_proj", "out_proj"])


def test_adapter_that_fits_the_model_in_part_is_refused(tmp_path):
    made = adapted(tiny_model())
    made.save_pretrained(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    first = next(name for name in saved if "q_proj.lora_B" in name)
    less = {name: tensor for name, tensor in saved.items() if name != first}
    other = first.replace("layers.0", "layers.9")
    for case, weights, words in [
        (
            "less",
            less,
            "1 weight is missing that adapter_config.json asks for, such as "
            f"{first.removesuffix('.weight')}",
        ),
        ("other", {**less, other: saved[first]}, "1 weight in it fits no layer"),
    ]:
        shutil.copytree(tmp_path / "whole", tmp_path / case)
        save_file(weights, tmp_path / case / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=f"only a part of the adapter.*{words}"):
            load_adapter(tiny_model(), tmp_path / case)
        with pytest.raises(ModelError, match=r"other layers|only a part of the adapter"):
            load_adapter_weights(adapted(tiny_model()), tmp_path / case)
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "whole" / "adapter_config.json", tmp_path / "bin")
    torch.save(less, tmp_path / "bin" / "adapter_model.bin")
    with pytest.raises(ModelError, match="only a part of the adapter"):
        load_adapter(tiny_model(), tmp_path / "bin")
    both = load_adapter(
        load_adapter(tiny_model(), tmp_path / "whole"), tmp_path / "whole", name="b"
    )
    with pytest.raises(ModelError, match="only a part of the adapter"):
        load_adapter(both, tmp_path / "less", name="c")


def test_output_of_adapted_layers_may_be_changed_in_place():
    model = adapted(tiny_model())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    output = layer(torch.randn(1, 3, 32))
    output *= 2
    output.sum().backward()
    assert layer.lora_A["default"].weight.grad is not None
