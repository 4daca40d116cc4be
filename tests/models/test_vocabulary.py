"""Embeddings that grow: in training, in chat, and with other programs' adapters."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from xtuner import api
from xtuner.chat.opening import open_chat
from xtuner.convert.merge import merge
from xtuner.errors import ConfigError, ModelError
from xtuner.models import vocabulary
from xtuner.models.adapters import load_adapter
from xtuner.serve.models import open_models
from xtuner.testing.tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from xtuner.types import Conversation, Message

NEW = [261, 262, 263]
IDS = torch.randint(5, 261, (1, 20), generator=torch.Generator().manual_seed(0))
GROWN = torch.cat([IDS, torch.tensor([NEW])], dim=1)
BOTH = ["embed_tokens", "lm_head"]
CASES = {
    "attention alone": ({}, 264),
    "both saved": ({"modules_to_save": BOTH}, 264),
    "padded": ({"modules_to_save": BOTH}, 320),
    "fewer tokens": ({"modules_to_save": BOTH}, 250),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, 264),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, 264),
    "tokens": ({"trainable_token_indices": NEW}, 264),
    "old tokens": ({"trainable_token_indices": [5, 9, 77]}, 261),
    "tokens of both": ({"trainable_token_indices": dict.fromkeys(BOTH, NEW)}, 264),
}
ALL = [(case, tied) for case in CASES for tied in (False, True)]


def grown(base, size):
    model = AutoModelForCausalLM.from_pretrained(base)
    if size != 261:
        vocabulary.resize(model, size)
    return model


def write_adapter(folder, base, size, config):
    """An adapter as PEFT saves it, with random values, and a tokenizer with its tokens."""
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(grown(base, size), LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "<c>"] if size > 261 else [])
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("case", "tied"), ALL, ids=[f"{c}, {'tied' * t}" for c, t in ALL])
def test_adapters_of_other_vocabularies_merge_as_peft_merges_them(case, tied, tmp_path):
    config, size = CASES[case]
    base = tiny_model_folder(tmp_path / "base", tie_word_embeddings=tied)
    folder = write_adapter(tmp_path / "adapter", base, size, config)
    ids = GROWN if size > 261 else IDS.clamp(max=size - 1)
    adapted = PeftModel.from_pretrained(grown(base, size), folder)
    expected = logits(adapted, ids)
    said = []
    report = merge(str(base), folder, tmp_path / "merged", dtype="float32", log=said.append)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = logits(merged, ids)
    assert found.shape[-1] == expected.shape[-1] == size
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert merged.config.vocab_size == size and report.relative < 1e-5
    if size != 261:
        assert any("than the model has" in line for line in said)
    session = open_chat(base, adapter=folder, dtype="float32")
    assert (logits(session.model, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_new_rows_are_the_mean_of_the_others_on_every_load():
    for tied in (False, True):
        first, second = (tiny_model(tie_word_embeddings=tied) for _ in range(2))
        before = logits(first, IDS)
        mean = first.get_input_embeddings().weight.mean(0)
        for model in (first, second):
            vocabulary.resize(model, 264)
        head, embedding = first.get_output_embeddings(), first.get_input_embeddings()
        assert (embedding.weight[261:] - mean).abs().max() < 1e-6
        assert (head.weight is embedding.weight) == tied
        assert torch.equal(embedding.weight, second.get_input_embeddings().weight)
        assert torch.equal(head.weight, second.get_output_embeddings().weight)
        assert torch.equal(logits(first, IDS)[..., :261], before)


def test_a_model_with_embeddings_in_every_layer_is_refused():
    model = tiny_model()
    model.config.vocab_size_per_layer_input = 261
    with pytest.raises(ModelError, match="cannot be resized from 261 to 264 rows"):
        vocabulary.resize(model, 264)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_second_adapter_does_not_change_the_vocabulary_of_the_first(tmp_path):
    base = tiny_model_folder(tmp_path / "base")
    plain = write_adapter(tmp_path / "plain", base, 261, {})
    more = write_adapter(tmp_path / "more", base, 264, {"modules_to_save": BOTH})
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(base), plain)
    with pytest.raises(ModelError, match=r"3 more tokens .*shared with other adapters"):
        load_adapter(adapted, more, name="second")


def base_with_more_tokens(folder, *, tied):
    tiny_model_folder(folder, tie_word_embeddings=tied)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<act>", "</act>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Do it"},
             {"role": "assistant", "content": "<act>go</act>"}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)

    def make(tied, **changes):
        return {
            "pretrained_model_name_or_path": str(
                base_with_more_tokens(tmp_path / "base", tied=tied)
            ),
            "data_path": "rows.jsonl", "resize_embeddings": True, "lora_r": 4, "max_length": 64,
            "accumulative_counts": 1, "pack_length": 64, "max_epochs": 2, "lr": 1e-2,
            "dtype": "float32", "save_steps": 2, "save_total_limit": 9, "tensorboard": False,
            "num_threads": 1, "evaluation_rows": 0, **changes,
        }  # fmt: skip

    return make


RUNS = {
    "lora": ({"tuning": "lora"}, False),
    "lora, tied": ({"tuning": "lora"}, True),
    "qlora, tied": ({"tuning": "qlora"}, True),
    "saved head": ({"tuning": "lora", "lora_modules_to_save": ["lm_head"]}, False),
    "full": ({"tuning": "full"}, False),
}


@pytest.mark.parametrize("case", RUNS)
def test_new_tokens_are_trained_saved_resumed_asked_and_merged(case, tmp_path, settings, capsys):
    changes, tied = RUNS[case]
    given = settings(tied, **changes)
    done = api.train(given, work_dir=tmp_path / "run")
    out = " ".join(capsys.readouterr().out.split())
    assert "the embeddings grow from 261 to 263 rows" in out
    session = open_chat(done.work_dir, dtype="float32")
    text = session.template.encode(conversation()).input_ids
    assert {261, 262} <= set(text)
    wanted = logits(session.model, torch.tensor([text]))
    assert wanted.shape[-1] == 263
    rows = session.model.get_input_embeddings()(torch.tensor([261, 262]))
    mean = tiny_model(tie_word_embeddings=tied).get_input_embeddings().weight.mean(0)
    assert (rows - mean).abs().max() > 1e-3  # they were trained
    if given["tuning"] != "full":
        merge(given["pretrained_model_name_or_path"], done.work_dir, tmp_path / "merged",
              dtype="float32", log=lambda line: None)  # fmt: skip
        merged = open_chat(tmp_path / "merged", dtype="float32")
        found = logits(merged.model, torch.tensor([text]))
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert merged.model.config.vocab_size == 263
    if case == "lora, tied":
        again = api.train(given, work_dir=tmp_path / "run", resume="iter_2")
        resumed = open_chat(again.work_dir, dtype="float32")
        assert torch.equal(logits(resumed.model, torch.tensor([text])), wanted)


def test_an_adapter_of_low_rank_on_new_rows_is_refused(tmp_path, settings):
    given = settings(False, tuning="lora", lora_target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ConfigError, match="trains the new rows of embed_tokens"):
        api.train(given, work_dir=tmp_path / "run")


def conversation():
    turns = Message("user", "Do it"), Message("assistant", "<act>go</act>")
    return Conversation(turns)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_with_its_own_vocabulary_is_served_alone(tmp_path):
    base = tiny_model_folder(tmp_path / "base")
    more = write_adapter(tmp_path / "more", base, 264, {"modules_to_save": BOTH})
    plain = write_adapter(tmp_path / "plain", base, 261, {})
    assert [model.name for model in open_models(str(base), [str(more)])] == ["base:more"]
    assert len(open_models(str(base), [str(plain)])) == 2
    with pytest.raises(ConfigError, match="a vocabulary of its own; serve it without others"):
        open_models(str(base), [str(more), str(plain)])
