"""The built-in settings under the names of XTuner 0.1."""

import pytest

from xtuner.cli.app import main
from xtuner.config.builtin import catalog, catalog_xtuner0
from xtuner.config.load import load_settings
from xtuner.errors import ConfigError


def test_every_old_name_composes_or_has_a_reason():
    names, missing = catalog_xtuner0.names(), catalog_xtuner0.missing()
    assert len(names) + len(missing) == 585 and not {*names} & {*missing}
    for name, reason in missing.items():
        with pytest.raises(ConfigError, match=reason[:20]):
            load_settings(name)


def test_the_search_of_the_course_shows_its_two_first():
    shown = catalog.names("internlm2_1_8b")
    assert shown[:2] == ["internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_qlora_alpaca_e3"]


# name, and the values of its config in XTuner 0.1.23
OLD = {
    "internlm2_1_8b_qlora_alpaca_e3": {
        "pretrained_model_name_or_path": "internlm/internlm2-1_8b", "lora_r": 64, "lora_alpha": 16,
        "lora_dropout": 0.1, "max_length": 2048, "accumulative_counts": 16, "batch_size": 1,
        "lr": 2e-4, "max_epochs": 3, "warmup_ratio": 0.03, "evaluation_freq": 500,
        "save_steps": 500, "save_total_limit": 2, "prompt_template": "xtuner0_default",
        "steps_are": "micro_batches", "evaluation_max_new_tokens": 600,
    },
    "internlm_7b_full_oasst1_e3": {"prompt_template": "internlm_chat", "lr": 2e-5},
    "phi3_mini_128k_instruct_full_alpaca_e3": {"max_length": 131072},
    "llama2_70b_int8_lora_open_platypus_e1": {
        "quantization": "int8", "tuning": "qlora", "lora_r": 16, "lr": 3e-4, "lora_dropout": 0.05,
    },
    "qwen_7b_qlora_moss_sft_all_e2_gpu8": {"batch_size": 8, "accumulative_counts": 1},
    "mistral_7b_full_finetune_custom_sft_e1": {
        "tuning": "qlora", "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1,
    },
    "llama2_7b_qlora_oasst1_512_e3": {"max_length": 512, "pack_to_max_length": False},
    "internlm2_5_chat_20b_alpaca_e3": {"tuning": "full", "accumulative_counts": 1},
    "llava_v15_13b_finetune_lora": {
        "tuning": "lora", "lora_r": 128, "visual_encoder_lora_r": None, "lr": 2e-4,
        "pretrained_model_name_or_path": "lmsys/vicuna-13b-v1.5",
        "pretrained_pth": "./work_dirs/llava_v15_13b_pretrain",
    },
    "llava_llama3_8b_instruct_quant_clip_vit_large_p14_336_e1_gpu1_pretrain": {
        "accumulative_counts": 256, "batch_size": 1, "group_by_modality": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_a_name_has_the_values_of_its_config(name):
    settings = load_settings(name).settings
    assert {key: getattr(settings, key) for key in OLD[name]} == OLD[name]


def test_another_number_of_epochs_changes_nothing_else():
    three, five = (catalog.compose(f"internlm2_1_8b_qlora_alpaca_e{n}") for n in (3, 5))
    assert {**three, "max_epochs": 5} == five
    assert not catalog.is_name("internlm2_1_8b_qlora_alpaca_e0")


def test_copied_file_describes_itself(tmp_path):
    assert main(["copy-cfg", "baichuan2_7b_chat_qlora_alpaca_e3", str(tmp_path)]) == 0
    text = (tmp_path / "baichuan2_7b_chat_qlora_alpaca_e3_copy.py").read_text(encoding="utf-8")
    text = " ".join(text.split())
    assert "qwen2_5_7b_instruct" in text
    assert "steps count micro-batches" in text and "trust_remote_code = True" in text
