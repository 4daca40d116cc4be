"""A merged model against PEFT's merge and against base + adapter."""

import json
import shutil

import pytest
import torch
from checkpoint_maker import write_adapter
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from xtuner.convert import compare
from xtuner.convert.merge import merge
from xtuner.convert.weights import Weights
from xtuner.errors import ModelError
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, load_tokenizer
from xtuner.models.run_info import RunInfo
from xtuner.testing.tiny import tiny_model, tiny_model_folder

IDS = torch.arange(5, 45)[None]
ATTENTION = ["q_proj", "v_proj"]


def lora(**options):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **options})


def quiet_merge(*arguments, **options):
    lines = []
    report = merge(*arguments, log=lines.append, **options)
    return report, "\n".join(lines)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


UNTIED = {
    "all-linear": lora(target_modules="all-linear"),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"layers.0.*.q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "head": lora(target_modules=[*ATTENTION, "lm_head"]),
    "embedding": lora(target_modules=[*ATTENTION, "embed_tokens"]),
    "modules_to_save": lora(modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("config", UNTIED.values(), ids=UNTIED)
def test_by_shard_equals_peft_in_float32(config, tiny_model_path, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", tiny_model_path, config=config)
    report, _ = quiet_merge(tiny_model_path, adapter, tmp_path / "merged")
    assert report.how == "shard by shard" and report.relative < 1e-5
    adapted = load_adapter(load_model(tiny_model_path, dtype=torch.float32), adapter)
    expected = adapted.merge_and_unload().state_dict()
    found = Weights.of_model(tmp_path / "merged")
    assert set(found.stored) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-6, name


TIED = {
    "layers alone": (lora(), True),
    "head": (lora(target_modules=["lm_head"]), False),
    "embedding": (lora(target_modules=["embed_tokens"]), False),
    "saved head": (lora(modules_to_save=["lm_head"]), False),
    "saved embedding": (lora(modules_to_save=["embed_tokens"]), False),
}


@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.parametrize("in_memory", [False, True], ids=["shard by shard", "in memory"])
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_part_only_if_the_adapter_changes_them(case, in_memory, tmp_path):
    """PEFT by itself would also merge the adapter of the head into the embedding."""
    config, stays_tied = TIED[case]
    base = tiny_model_folder(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", base, config=config)
    if in_memory:
        without_safetensors(base)
    report, _ = quiet_merge(base, adapter, tmp_path / "merged")
    assert report.how == ("in memory" if in_memory else "shard by shard")
    expected = logits(load_adapter(load_model(base, dtype=torch.float32), adapter))
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert close(logits(merged), expected)
    assert merged.config.tie_word_embeddings == stays_tied


def without_safetensors(folder):
    torch.save(every_tensor(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def every_tensor(folder):
    weights = Weights.of_model(folder)
    return {name: weights[name] for name in weights.stored}


def test_several_shards_hold_what_one_does(tiny_model_path, adapter, tmp_path):
    quiet_merge(tiny_model_path, adapter, tmp_path / "one")
    quiet_merge(tiny_model_path, adapter, tmp_path / "many", max_shard_size="40KB")
    one, many = Weights.of_model(tmp_path / "one"), Weights.of_model(tmp_path / "many")
    assert len(one.files) == 1 and len(many.files) > 2
    assert set(one.stored) == set(many.stored)
    assert all(torch.equal(one[name], many[name]) for name in one.stored)
    assert all(file.stat().st_size < 60_000 for file in many.files)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora(use_dora=True), "use_dora"),
        (lora(lora_bias=True, target_modules=["q_proj"]), "lora_bias"),
        (lora(init_lora_weights="pissa"), "init_lora_weights"),
    ],
    ids=["dora", "lora_bias", "pissa"],
)
def test_unsupported_layout_is_merged_in_memory(config, reason, tmp_path):
    base = tiny_model_folder(tmp_path / "base", attention_bias=True)
    adapter = write_adapter(tmp_path / "adapter", base, config=config)
    report, said = quiet_merge(base, adapter, tmp_path / "merged")
    assert report.how == "in memory" and reason in said
    expected = logits(load_adapter(load_model(base, dtype=torch.float32), adapter))
    assert close(logits(load_model(tmp_path / "merged", dtype=torch.float32)), expected)


@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_unmergeable_adapter_is_a_user_error(tiny_model_path, tmp_path):
    config = lora(lora_bias=True)  # a bias for layers without one
    adapter = write_adapter(tmp_path / "adapter", tiny_model_path, config=config)
    with pytest.raises(ModelError, match="PEFT cannot merge"):
        quiet_merge(tiny_model_path, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_short_type_is_rounded_once_and_named_in_the_config(
    dtype, tiny_model_path, adapter, tmp_path
):
    report, _ = quiet_merge(tiny_model_path, adapter, tmp_path / "short", dtype=dtype)
    quiet_merge(tiny_model_path, adapter, tmp_path / "exact")
    assert 0 < report.relative < 2e-2
    short, exact = Weights.of_model(tmp_path / "short"), Weights.of_model(tmp_path / "exact")
    kind = getattr(torch, dtype)
    assert all(torch.equal(short[name], exact[name].to(kind)) for name in exact.stored)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["dtype"] == dtype and "torch_dtype" not in config


def test_a_quantised_base_is_dequantised_first(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    plain = tiny_model_folder(tmp_path / "plain", **sizes)
    adapter = write_adapter(tmp_path / "adapter", plain)
    packed = load_model(plain, dtype=torch.float32, quantization="nf4")
    packed.save_pretrained(tmp_path / "nf4")
    report, said = quiet_merge(tmp_path / "nf4", adapter, tmp_path / "merged")
    assert report.how == "in memory" and "stored quantized" in said and "trained on" in said
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    exact = load_model(plain, dtype=torch.float32, quantization="nf4").dequantize()
    assert close(logits(merged), logits(load_adapter(exact, adapter)), 1e-4)


def test_internlm2_keeps_its_fused_layout(tmp_path):
    from xtuner.models.families import internlm2

    internlm2.register()
    base = tiny_model_folder(tmp_path / "base", "internlm2", attention_bias=False)
    assert any("wqkv" in name for name in Weights.of_model(base).stored)
    adapter = write_adapter(tmp_path / "adapter", base)
    report, _ = quiet_merge(base, adapter, tmp_path / "merged")
    assert report.how == "in memory" and report.relative < 1e-5
    assert set(Weights.of_model(tmp_path / "merged").stored) == set(Weights.of_model(base).stored)


def test_the_result_has_tokenizer_template_and_its_origin(tiny_model_path, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    (own / "chat_template.jinja").write_text("{{ 'own' }}")
    (own / "notes.txt").write_text("of the run")
    quiet_merge(tiny_model_path, own, tmp_path / "merged")
    info = RunInfo.read(tmp_path / "merged")
    assert (info.kind, info.base_model) == ("model", tiny_model_path.name)
    assert (info.prompt_template, info.system, info.step) == ("qwen_chat", "Be brief.", 7)
    assert load_tokenizer(tmp_path / "merged").chat_template == "{{ 'own' }}"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "generation_config.json" in names
    assert not names & {"notes.txt", "training_state.pt", "adapter_config.json"}


def test_another_base_than_trained_on_gets_a_warning(tiny_model_path, adapter, tmp_path):
    copied = shutil.copytree(tiny_model_path, tmp_path / "copy")
    _, said = quiet_merge(copied, adapter, tmp_path / "merged")
    assert f"was trained on {tiny_model_path}" in said
    _, said = quiet_merge(tiny_model_path, adapter, tmp_path / "again")
    assert "Warning" not in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "is not an object"),
        ("{}", "peft_type is missing"),
        ('{"peft_type": "LORA", "alpha_pattern": 7}', "alpha_pattern is 7"),
        ('{"peft_type": "LORA", "alora_invocation_tokens": ["x"]}', "are not token ids"),
        ('{"peft_type": "X", "r": 2, "lora_alpha": 4}', "adapter_config.json is damaged"),
    ],
    ids=["list", "empty", "pattern", "alora", "type"],
)
def test_a_malformed_adapter_config_is_named(content, words, tiny_model_path, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "bad")
    (tmp_path / "bad" / "manifest.json").unlink(missing_ok=True)
    (tmp_path / "bad" / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        quiet_merge(tiny_model_path, tmp_path / "bad", tmp_path / "merged")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("lora_A", lambda a: a[:-1].contiguous(), "has rank 3, and .*lora_B.* has rank 4"),
        ("lora_B", lambda b: b * float("nan"), "the adapter's weights are not finite"),
    ],
    ids=["rank", "diverged"],
)
def test_weights_that_cannot_be_merged_are_named(
    part, change, words, tiny_model_path, adapter, tmp_path
):
    shutil.copytree(adapter, tmp_path / "bad")
    (tmp_path / "bad" / "manifest.json").unlink(missing_ok=True)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if part in key)
    save_file({**tensors, name: change(tensors[name])}, file)
    with pytest.raises(ModelError, match=words):
        quiet_merge(tiny_model_path, tmp_path / "bad", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_model_that_diverged_is_not_merged(adapter, tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="the logits are not finite"):
        quiet_merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_code_of_the_base_model_needs_the_flag(adapter, tmp_path):
    """Also if the adapter was trained on quantized weights."""
    base = tiny_model_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text("raise SystemExit('it ran')\n")
    shutil.copytree(adapter, tmp_path / "nf4")
    (tmp_path / "nf4" / "manifest.json").unlink(missing_ok=True)
    settings = {"tuning": "qlora", "quantization": "nf4"}
    RunInfo("adapter", str(base), settings=settings, dtype="float32").write(tmp_path / "nf4")
    for folder in (adapter, tmp_path / "nf4"):
        with pytest.raises(ModelError, match=r"not run.*add --trust-remote-code"):
            quiet_merge(base, folder, tmp_path / "merged")


def test_base_model_with_other_shapes_is_rejected(adapter, tmp_path):
    other = tmp_path / "other"
    tiny_model(intermediate_size=48).save_pretrained(other)
    with pytest.raises(ModelError, match="does not fit the base model"):
        quiet_merge(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_wrong_merge_is_found_and_leaves_nothing(tiny_model_path, adapter, tmp_path, monkeypatch):
    from xtuner.convert.lora import Change

    right = Change.apply
    monkeypatch.setattr(Change, "apply", lambda *a, **k: right(*a, **k) * 1.01)
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError, match="differs from"):
        quiet_merge(tiny_model_path, adapter, tmp_path / "new" / "merged")
    assert set(tmp_path.iterdir()) == before


def test_rounding_that_depth_amplifies_is_no_error(tmp_path):
    """The files contain exactly the rounded weights; 24 random layers amplify the rounding."""
    base = tmp_path / "base"
    tiny_model(num_hidden_layers=24, initializer_range=0.5).bfloat16().save_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", base, alpha=0.3)
    report, said = quiet_merge(base, adapter, tmp_path / "merged")
    assert report.relative > 0.05 and "rounding to torch.bfloat16 changes logits" in said


def test_a_wrong_merge_is_found_beside_rounding(tmp_path, monkeypatch):
    from xtuner.convert.lora import Change

    base = tmp_path / "base"
    tiny_model().bfloat16().save_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", base)
    right = Change.apply
    monkeypatch.setattr(Change, "apply", lambda *a, **k: right(*a, **k) * 1.05)
    with pytest.raises(ModelError, match="differs from"):
        quiet_merge(base, adapter, tmp_path / "merged")


def test_change_lost_in_rounding_is_warned_about(tmp_path):
    base = tmp_path / "base"
    tiny_model().bfloat16().save_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", base, alpha=1e-4)
    _, said = quiet_merge(base, adapter, tmp_path / "merged")
    assert "so much of its effect is lost" in said


def test_too_little_memory_skips_the_comparison(tiny_model_path, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "fitting_dtype", lambda *a, **k: None)
    report, said = quiet_merge(tiny_model_path, adapter, tmp_path / "merged")
    assert report.max_difference is None and "was not verified" in said
    assert (tmp_path / "merged" / "model.safetensors").is_file()
