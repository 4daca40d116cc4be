"""rsLoRA, DoRA, PiSSA, LoRA+ and NEFTune."""

import math

import pytest
import torch

from xtuner.config.load import load_settings
from xtuner.config.marks import as_nested, thawed
from xtuner.config.render import render_all
from xtuner.engine.optimizer import optim
from xtuner.errors import ConfigError
from xtuner.models.adapter_checks import config_problems
from xtuner.models.adapters import add_adapter, notes_on_adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.check.isolation import IsolationCheck
from xtuner.models.load import located_config, meta_model
from xtuner.models.neftune import EmbeddingNoise
from xtuner.models.prepare import make_trainable
from xtuner.testing.tiny import tiny_model, tiny_model_folder

IDS = torch.arange(5, 45)[None]


def adapted(**further):
    model = add_adapter(tiny_model(), r=4, alpha=8, seed=3, further=further)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "pissa" not in str(further):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_rank_stabilized_adapters_keep_the_fast_forward_pass():
    plain, stable = adapted(), adapted(use_rslora=True)
    layer = stable.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 8 / math.sqrt(4)
    assert not list(notes_on_adapters(stable))
    assert (logits(plain) - logits(stable)).abs().max() > 1e-3


def test_adapters_computed_by_peft_are_noted_and_equal_peft(monkeypatch):
    ours = adapted(use_dora=True)
    (note,) = notes_on_adapters(ours)
    assert note.startswith("14 of 14 adapters are computed by PEFT because of lora_config")
    one = {"use_dora": True, "layers_to_transform": [1]}
    (note,) = notes_on_adapters(
        add_adapter(tiny_model(), r=4, alpha=8, target_modules=["q_proj"], further=one)
    )
    assert note.startswith("1 of 1 adapter is computed by PEFT")
    monkeypatch.setattr("xtuner.models.adapters.layer_classes", dict)
    assert (logits(ours) - logits(adapted(use_dora=True))).abs().max() < 1e-5


def test_principal_parts_start_from_the_model_itself():
    model = adapted(init_lora_weights="pissa")
    assert (logits(model) - logits(tiny_model())).abs().max() < 1e-4
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "use 'pissa', which recomputes the same ones"),
        ({"use_drora": True}, "no such field; did you mean 'use_dora'"),
        ({"r": 8}, "r: is the setting lora_r"),
        ({"init_lora_weights": "eva"}, "needs passes over the data"),
        ({"task_type": "SEQ_CLS"}, "is set by xtuner"),
    ],
)
def test_wrong_fields_are_named(further, words):
    (problem,) = config_problems(further)
    assert problem.startswith("lora_config: ") and words in problem


def test_all_wrong_fields_are_told_and_the_values_of_the_others():
    further = {"r": 8, "use_drora": True, "layers_pattern": "layers"}
    first, second, third = config_problems(further)
    assert "r: is the setting lora_r" in first and "did you mean 'use_dora'" in second
    assert third.startswith("lora_config = {'layers_pattern': 'layers'}: When `layers_pattern`")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_some_layers_get_adapters_on_all_their_linear_layers(kind):
    model = add_adapter(tiny_model(kind), r=4, alpha=8, further={"layers_to_transform": [1]})
    names = {n for n, _ in model.named_parameters() if "lora_A" in n}
    every = add_adapter(tiny_model(kind), r=4, alpha=8)
    assert names == {n for n, _ in every.named_parameters() if "lora_A" in n and ".1." in n}


def test_fields_that_exclude_each_other_are_one_message():
    with pytest.raises(ConfigError, match="lora_config = "):
        add_adapter(tiny_model(), r=4, alpha=8, further={"layers_pattern": "layers"})


def test_nested_fields_survive_a_settings_file(tmp_path):
    given = {"rank_pattern": {"q_proj": 8}, "layers_to_transform": [0, 1], "use_rslora": True}
    assert thawed(as_nested(given)) == given
    needed = {"pretrained_model_name_or_path": "m", "data_path": "d.jsonl"}
    settings = load_settings({**needed, "lora_config": given}).settings
    assert hash(settings) is not None
    (tmp_path / "s.py").write_text(render_all(settings, title="t"))
    assert load_settings(str(tmp_path / "s.py")).settings == settings


def test_lora_plus_gives_the_second_matrices_a_rate_of_their_own():
    model = adapted()
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    made = optim.make_optimizer("AdamW", model, lr=1e-3, loraplus_lr_ratio=16.0, **options)
    optim.set_learning_rate(made, 2e-3)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(2e-3 * (16 if "lora_B" in name else 1))


def test_noise_is_that_of_each_samples_length_and_of_training_alone():
    lm = PackedCausalLM(tiny_model())
    batch = IsolationCheck(lm).batch()
    seen = []
    embedding = lm.causal.get_input_embeddings()
    plain = embedding(batch.input_ids).detach()
    quiet = lm(batch).detach()
    lm.noise = EmbeddingNoise(embedding, 5.0)
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    lm.eval()
    assert torch.equal(lm(batch), quiet)
    lm.train()
    assert not torch.equal(lm(batch), quiet)
    noise = (seen[-1] - plain)[0]
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        bound = 5.0 / math.sqrt((stop - start) * 32)
        assert 0.9 * bound < noise[start:stop].abs().max() <= bound * (1 + 1e-6)


def test_an_adapter_names_its_base_model_for_every_folder(tmp_path, monkeypatch):
    tiny_model_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    given = {"pretrained_model_name_or_path": "./base", "data_path": "d.jsonl", "tuning": "lora"}
    settings = load_settings(given).settings
    made = make_trainable(
        settings, dtype=torch.float32, device="cpu", recompute=False,
        base=lambda dtype: meta_model(located_config("./base"), dtype=dtype),
    )  # fmt: skip
    assert made.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
