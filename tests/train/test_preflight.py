"""Problems of a run are reported before its data are read."""

import json

import pytest
from data_makers import chat, write_jsonl

from xtuner.config.load import load_settings
from xtuner.errors import ConfigError, ModelError
from xtuner.models.facts import facts_of
from xtuner.testing.tiny import CHATML_TEMPLATE, tiny_model_folder, tiny_tokenizer
from xtuner.training.data_parts import DataParts
from xtuner.training.preflight import check_run, note_on_positions


def loaded(folder, **settings):
    path = write_jsonl(folder.parent / "rows.jsonl", [chat("Hi", "x" * n) for n in (10, 90, 200)])
    return load_settings(
        {
            "pretrained_model_name_or_path": str(folder),
            "data_path": str(path),
            "tuning": "lora",
            "max_length": 512,
            **settings,
        }
    )


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    return tiny_model_folder(folder, max_position_embeddings=128)


def test_problems_are_reported_together(llama):
    with pytest.raises(ConfigError) as caught:
        check_run(
            loaded(llama, optim_type="AdmaW", attn_implementation="flash_atention_2").settings
        )
    told = str(caught.value)
    assert "2 problems" in told and "did you mean 'flash_attention_2'" in told
    assert "optim_type = 'AdmaW': unknown optimizer; did you mean 'AdamW'?" in told


def test_layers_for_adapters_are_looked_up_before_data_are_read(llama):
    names = {"lora_target_modules": ["q_proj", "q_porj"], "lora_modules_to_save": ["lm_haed"]}
    with pytest.raises(ConfigError, match=r"no layer 'q_porj', 'lm_haed'; its linear .*q_proj"):
        check_run(loaded(llama, **names).settings)


def test_all_problems_with_adapters_are_told_before_data_are_read(llama):
    given = {
        "lora_target_modules": ["q_porj", "norm"],
        "lora_config": {"use_drora": True, "init_lora_weights": "pissa_niter_4"},
        "report_to": ["tensorboard", "swanlab"],
        "custom_hooks": ["own.py:A", "other.py:B"],
    }
    with pytest.raises(ConfigError) as caught:
        check_run(loaded(llama, **given).settings)
    told = str(caught.value)
    for words in (
        "no layer 'q_porj'", "'norm' is a LlamaRMSNorm", "did you mean 'use_dora'", "use 'pissa'",
        "own.py", "other.py",
    ):  # fmt: skip
        assert words in told


def test_what_only_peft_knows_of_adapters_is_told_before_data_are_read(llama):
    given = {"lora_config": {"rank_pattern": {"q_proj": 0}}}
    with pytest.raises(ConfigError, match=r"^lora_config = .*q_proj.*: .*rank|integer"):
        check_run(loaded(llama, **given).settings)
    check_run(loaded(llama, lora_config={"rank_pattern": {"q_proj": 2}}).settings)
    assert all(p.is_meta for p in facts_of(loaded(llama).settings).model.parameters())
    assert not hasattr(facts_of(loaded(llama).settings).model, "peft_config")


def test_hooks_are_looked_at_before_data_are_read(llama, tmp_path):
    (tmp_path / "own.py").write_text("class Mine:\n    pass\n")
    for name, words in [("own.py:Mine", "not a subclass"), ("own.py:Min", "did you mean 'Mine'")]:
        with pytest.raises(ConfigError, match=words):
            check_run(loaded(llama, custom_hooks=[name]).settings, folder=tmp_path)


def test_attention_of_a_package_that_is_not_installed_is_named(llama, monkeypatch):
    settings = loaded(llama, attn_implementation="flash_attention_2").settings
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package flash-attn, which is not installed"):
        check_run(settings)


def test_full_tuning_of_quantized_weights_is_refused(tmp_path):
    folder = tiny_model_folder(tmp_path / "model")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"stored in 4 bits \(bitsandbytes\), which cannot be tr"):
        check_run(loaded(folder, tuning="full").settings)
    check_run(loaded(folder).settings)


def test_rows_beyond_the_positions_of_a_rotary_model_are_noted(llama):
    given = loaded(llama)
    data = DataParts.open(given).build(quiet=True)
    note = note_on_positions(given.settings, data.train)
    assert note and note.startswith("1 sample is longer than the model's 128 positions")
    assert "max_length = 128 cuts longer samples" in note
    short = loaded(llama, max_length=100)
    assert note_on_positions(short.settings, DataParts.open(short).build(quiet=True).train) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt", "biogpt"])
def test_learned_positions_are_a_limit(tmp_path, kind):
    folder = tiny_model_folder(tmp_path / "model", kind, max_position_embeddings=128)
    with pytest.raises(ConfigError, match=r"max_length = 512: .* 128 learned positions.* = 128"):
        check_run(loaded(folder).settings)
    check_run(loaded(folder, max_length=128).settings)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom"])
def test_other_positions_are_none(tmp_path, kind):
    assert not facts_of(loaded(tiny_model_folder(tmp_path / "m", kind)).settings).learned_positions


def larger_tokenizer(folder, *, chat_template):
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    tokenizer.add_tokens(["<|extra|>", "<|more|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_template_with_tokens_beyond_the_embeddings_is_refused(tmp_path):
    folder = tiny_model_folder(tmp_path / "model")
    template = CHATML_TEMPLATE.replace("<|im_start|>", "<|extra|>")
    with pytest.raises(ModelError) as caught:
        DataParts.open(loaded(larger_tokenizer(folder, chat_template=template)))
    told = str(caught.value)
    assert "has 263 tokens, but the model only 261 embeddings" in told
    assert "'<|extra|>', '<|more|>'" in told and "resize_embeddings = True" in told


def test_row_with_a_token_beyond_the_embeddings_is_a_bad_row(tmp_path):
    folder = larger_tokenizer(tiny_model_folder(tmp_path / "model"), chat_template=CHATML_TEMPLATE)
    given = loaded(folder)
    write_jsonl(tmp_path / "rows.jsonl", [chat("Hi", "ok"), chat("Hi <|more|>", "ok")])
    (source,) = DataParts.open(given).build(quiet=True).report.sources
    assert (source.rows_used, source.rows_lost) == (1, 1)
    assert "no embedding" in source.lost[0].what and "id 262" in source.lost[0].first[0].fault


@pytest.mark.parametrize(
    ("kind", "words"),
    [("t5", "encoder-decoder"), ("qwen2_5_vl", "a vision-language model"), ("vit", "not a causal")],
)
def test_non_language_models_are_reported(tmp_path, kind, words):
    folder = tiny_model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=words):
        DataParts.open(loaded(folder))
