"""InternLM2 is written in the form that other programs read: layout, keys, code, tokenizer."""

import json

import pytest
import sentencepiece
import torch
from internlm2_maker import forward, write_internlm2
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from xtuner.cli.app import main
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, load_tokenizer

IDS = [1, 5, 300, 17, 42, 99, 7, 7, 12, 250, 31, 8, 77, 140, 2, 6, 91, 33, 18, 200]
UNCHANGED = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "modeling_internlm2.py", "configuration_internlm2.py",
    "tokenization_internlm2.py",
)  # fmt: skip
TEXTS = [
    "请做一下自我介绍", "hello world", " two  spaces ", "def add(a, b):\n    return a + b", "\n\nx",
    "Ünïcödé 🎉", "", "a", " ", "x\ty", "mixed 中文 and English 123",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_internlm2(tmp_path_factory.mktemp("internlm2") / "base")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A folder with the runs `adapter` and `full`."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"conversation": [{"input": "Who are you?", "output": "I am small."}]}] * 4
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, tuning in (("adapter", "lora"), ("full", "full")):
        (folder / f"{name}.py").write_text(
            f"pretrained_model_name_or_path = {str(base)!r}\ntuning = {tuning!r}\n"
            f"data_path = {str(folder / 'rows.json')!r}\nlora_r = 4\nmax_length = 32\nlr = 0.01\n"
            f"accumulative_counts = 1\nmax_steps = 2\ndtype = 'float32'\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert main(["train", f"{name}.py", "--work-dir", name]) == 0
    return folder


def assert_as_published(folder, base, *, differing=()):
    for name in UNCHANGED:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    published = json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert {n for n in {*config, *published} if config.get(n) != published.get(n)} == {*differing}
    assert not (folder / "tokenizer.json").exists()
    assert {*load_file(folder / "model.safetensors")} == {*load_file(base / "model.safetensors")}


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def test_a_merged_model_is_read_by_others(base, trained, tmp_path):
    merged = tmp_path / "merged"
    assert main(["convert", "merge", str(base), str(trained / "adapter"), str(merged)]) == 0
    assert_as_published(merged, base)
    expected = logits(
        load_adapter(load_model(base, dtype=torch.float32), trained / "adapter/iter_2").eval()
    )
    assert (expected - forward(base, IDS)).abs().max() > 0.01
    torch.testing.assert_close(forward(merged, IDS), expected, rtol=0, atol=1e-4)


def test_auto_map_finds_the_code_beside_a_merged_model(base, trained, tmp_path, monkeypatch):
    merged = tmp_path / "merged"
    assert main(["convert", "merge", str(base), str(trained / "adapter"), str(merged)]) == 0
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    named = json.loads((merged / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    model = get_class_from_dynamic_module(named, merged).from_pretrained(merged)
    weight = load_file(merged / "model.safetensors")["model.tok_embeddings.weight"]
    assert torch.equal(model.model.tok_embeddings.weight, weight)


def test_a_fully_trained_checkpoint_is_read_by_others(base, trained, tmp_path):
    checkpoint, converted = trained / "full/iter_2", tmp_path / "hf"
    assert_as_published(checkpoint, base)
    torch.testing.assert_close(
        forward(checkpoint, IDS),
        logits(load_model(checkpoint, dtype=torch.float32).eval()),
        rtol=0,
        atol=1e-4,
    )
    config = str(trained / "full.py")
    assert main(["convert", "pth_to_hf", config, str(checkpoint), str(converted)]) == 0
    assert_as_published(converted, base, differing=["torch_dtype"])


def test_a_converted_adapter_has_the_layers_of_the_original_code(base, trained, tmp_path):
    source, hf = trained / "adapter/iter_2", tmp_path / "hf"
    assert main(["convert", "pth_to_hf", str(trained / "adapter.py"), str(source), str(hf)]) == 0
    config = json.loads((hf / "adapter_config.json").read_text())
    assert config["target_modules"] == ["w1", "w2", "w3", "wo", "wqkv"]
    adapter = load_file(hf / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for name in [name for name in adapter if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
        up, down = adapter[name.replace("_A.", "_B.")], adapter[name]
        rank = config["rank_pattern"].get(layer.split(".")[-2], config["r"])
        alpha = config["alpha_pattern"].get(layer.split(".")[-2], config["lora_alpha"])
        assert down.shape[0] == rank
        weights[layer] += (alpha / rank * (up.float() @ down.float())).to(weights[layer].dtype)
    merged = tmp_path / "merged"
    assert main(["convert", "merge", str(base), str(hf), str(merged)]) == 0
    found = load_file(merged / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    expected = logits(load_adapter(load_model(base, dtype=torch.float32), source).eval())
    again = logits(load_adapter(load_model(base, dtype=torch.float32), hf).eval())
    torch.testing.assert_close(again, expected, rtol=0, atol=2e-3)  # saved in 16 bits


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_ids_are_those_of_sentencepiece(add_dummy_prefix, tmp_path):
    folder = write_internlm2(tmp_path / "model", add_dummy_prefix=add_dummy_prefix)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    for found in (tokenizer, load_tokenizer(tmp_path / "saved")):
        for text in TEXTS:
            ids = found(text)["input_ids"]
            assert ids == [1, *reference.encode(text)], text
            assert found.decode(ids, skip_special_tokens=True) == text


def test_loading_says_nothing(base, capfd):
    load_tokenizer(base)
    load_model(base, dtype=torch.float32)
    assert "model of type" not in "".join(capfd.readouterr())
