"""The built-in settings: every name composes, copies and reads back."""

import pytest

from xtuner.config.builtin import catalog
from xtuner.config.load import load_settings
from xtuner.config.render import render, render_all
from xtuner.errors import ConfigError

NAMES = catalog.names()
# Every model, and every data set with every recipe.
SAMPLE = [*catalog.names("*_lora_custom_*"), *catalog.names("internlm2_1_8b_")]


def test_every_name_composes_to_settings_without_problems():
    for name in NAMES:
        assert load_settings(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "internlm2_1_8b_qlora_alpaca_e3",
        "internlm2_chat_7b_qlora_oasst1_e3",
        "smollm2_135m_instruct_lora_alpaca_e3",
        "smollm2_135m_instruct_lora_custom",
        "llama3_8b_instruct_full_alpaca_e3",
        "qwen1_5_7b_chat_qlora_alpaca_e3",
        "smollm2_1_7b_full_pretrain_e1",
    ],
)
def test_names_that_users_know_are_listed(name):
    assert name in NAMES


def test_name_is_composed_of_its_parts():
    values = catalog.compose("internlm2_chat_7b_qlora_alpaca_enzh_e5")
    assert values["pretrained_model_name_or_path"] == "internlm/internlm2-chat-7b"
    assert values["tuning"] == "qlora"
    assert values["data_path"] == ["tatsu-lab/alpaca", "silk-road/alpaca-data-gpt4-chinese"]
    assert values["max_epochs"] == 5
    assert values["prompt_template"] == "auto"
    assert catalog.compose("llama2_7b_full_alpaca_e1")["prompt_template"] == "default"


def test_names_with_images():
    start, end = "llava_internlm2_chat_1_8b", "clip_vit_large_p14_336"
    pretrain, finetune = (
        f"{start}_{end}_e1_gpu8_pretrain",
        f"{start}_qlora_{end}_lora_e1_gpu8_finetune",
    )
    assert {pretrain, finetune} <= set(NAMES)
    first, second = load_settings(pretrain).settings, load_settings(finetune).settings
    assert (first.llm_training, first.visual_encoder_training) == ("frozen", "frozen")
    assert (second.llm_training, second.visual_encoder_training) == ("adapter", "adapter")
    assert (second.lora_r, second.lora_alpha, second.lora_dropout) == (512, 256, 0.05)
    assert first.max_length == 2048 - 576 and second.pretrained_pth == f"./work_dirs/{pretrain}"
    assert "llava_data" in catalog.note(pretrain)
    with pytest.raises(ConfigError, match=f"did you mean {pretrain}"):
        catalog.compose(pretrain.replace("vit", "vti"))


def test_other_names_of_a_data_set_work():
    openorca = catalog.compose("llama2_13b_qlora_openorca_e1")
    assert openorca == catalog.compose("llama2_13b_qlora_open_orca_e1")
    assert catalog.names("llama2_13b_*openorca*")


def test_no_two_combinations_share_a_name():
    assert len(set(NAMES)) == len(NAMES)


def test_pretraining_is_for_base_models():
    assert catalog.compose("internlm2_7b_lora_pretrain_e1")["algorithm"] == "pretrain"
    assert not catalog.names("chat_7b_qlora_pretrain")
    with pytest.raises(ConfigError, match="base models"):
        catalog.compose("internlm2_chat_7b_qlora_pretrain_e1")


@pytest.mark.parametrize(
    ("pattern", "found", "missed"),
    [
        ("INTERNLM2_7b", "internlm2_7b_full_sql_e3", "llama2_7b_full_sql_e3"),
        ("qwen3*lora_sql_*", "qwen3_8b_qlora_sql_e3", "qwen3_8b_full_sql_e3"),
        ("llama?_7b_full*", "llama2_7b_full_sql_e3", "llama2_13b_full_sql_e3"),
    ],
)
def test_patterns(pattern, found, missed):
    names = catalog.names(pattern)
    assert found in names
    assert missed not in names


@pytest.mark.parametrize(
    ("wrong", "close"),
    [
        ("internlm2_1_8b_qlora_alpca_e3", "internlm2_1_8b_qlora_alpaca_e3"),
        ("internlm2_1_8b_qlora_alpaca", "internlm2_1_8b_qlora_alpaca_e3"),
        ("intrnlm2_7b_full_oasst1_e9", "internlm2_7b_full_oasst1_e9"),
        ("internlm2_1_8b", "internlm2_1_8b_full_"),
        ("internlm2_1_8b_qlora_alpaca_e0", "internlm2_1_8b_qlora_alpaca_e3"),
    ],
)
def test_a_wrong_name_is_answered_with_close_ones(wrong, close):
    with pytest.raises(ConfigError, match=f"did you mean {close}"):
        catalog.compose(wrong)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_copied_file_reads_back_to_the_same_settings_and_is_short(name, tmp_path):
    text = render(catalog.compose(name), title=name)
    path = tmp_path / "copy.py"
    path.write_text(text, encoding="utf-8")
    assert load_settings(path).settings == load_settings(name).settings
    assert len(text.splitlines()) <= 70
    assert max(len(line) for line in text.splitlines()) <= 100
    assert [f"# PART {n}" in text for n in range(1, 6)] == [True] * 5


def test_any_settings_read_back(tmp_path):
    settings = load_settings(
        "internlm2_7b_qlora_sql_e3",
        overrides=[
            "lora_modules_to_save=['embed_tokens']",
            "data_repeats=[0.1]",
            "weight_decay=1.2345e-7",
            "lr=0.00010000000000000002",
            "betas=(0, 0.5)",
            r"SYSTEM='a \"quote\", an \'other\', a \\ and\nlines' + ''",
            "evaluation_inputs=" + repr(["长" * 300 + " x\t" * 40, "\n\n", "", " '\" "]),
            "work_dir=/a b/c",
        ],
    ).settings
    for text in (
        render(settings.model_dump(), title='a """ and a \\'),
        render_all(settings, title="all\nof it"),
    ):
        path = tmp_path / "run.py"
        path.write_text(text, encoding="utf-8")
        assert load_settings(path).settings == settings


def test_numbers_are_written_as_users_write_them():
    text = render(catalog.compose("llama2_7b_full_sql_e3"), title="x")
    assert "\nlr = 2e-5\n" in text
    assert "\nbetas = (0.9, 0.999)\n" in text
