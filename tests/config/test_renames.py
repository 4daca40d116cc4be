"""Names and values of other trainers."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from xtuner.config.load import load_settings
from xtuner.config.renames import (
    advice,
    explained_as,
    no_counterpart,
    own_value,
    replaced_by,
    unknown_setting,
)
from xtuner.config.schema import ALIASES, field_parts
from xtuner.config.table_files import table
from xtuner.errors import ConfigError

KNOWN = sorted(
    {name for kind in ("absent", "needless", "use") for name in table("renamed")[kind]} - {*ALIASES}
)
"""Names of other trainers."""

MODEL = {"pretrained_model_name_or_path": "m", "data_path": "d.jsonl"}


def more(name):
    """What a setting requires to have an effect."""
    if name == "best_metric":
        return {"keep_best": True, "validation_ratio": 0.1}
    return {"tuning": "lora"} if name == "strategy" else {}


def test_several_hundred_names_are_known_and_none_is_a_setting():
    assert len(KNOWN) > 650
    assert not set(KNOWN) & set(field_parts())


@pytest.mark.parametrize("name", KNOWN)
def test_advice_names_settings_that_exist(name):
    text = advice(name)
    if text.startswith("use "):
        assert replaced_by(name), text
    named = re.findall(r"\b([a-z]+(?:_[a-z]+)+) = ", text)
    assert set(named) <= set(field_parts()), text


def test_every_argument_of_transformers_is_known():
    pytest.importorskip("torch")  # absent in `make test-python`
    """The fields are read from the source: importing the module takes many seconds."""
    folder = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    (kind,) = (
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"
    )
    fields = [n.target.id for n in kind.body if isinstance(n, ast.AnnAssign)]
    fields = {name for name in fields if not name.startswith("_")}
    assert len(fields) > 80
    assert not [n for n in sorted(fields - set(field_parts())) if advice(n) is None]


def names_of_trainers():
    text = Path(__file__).with_name("names_of_trainers.txt").read_text(encoding="utf-8")
    return {part.split("]")[0]: part.split("]")[1].split() for part in text.split("\n[")[1:]}


@pytest.mark.parametrize("trainer", ["trl", "llamafactory", "axolotl", "unsloth", "xtuner0"])
def test_every_setting_of_other_trainers_is_known(trainer):
    names = names_of_trainers()[trainer]
    assert len(names) > 45
    assert not [n for n in names if n not in {*field_parts(), *ALIASES} and advice(n) is None]


@pytest.mark.parametrize(
    ("name", "not_this"),
    [
        ("eval_steps", "max_steps"),
        ("val_size", "batch_size"),
        ("sequence_len", "sequence_parallel_size"),
        ("dora", "lora_r"),
        ("eval_size", "batch_size"),
        ("save_epochz", "max_epochs"),
        ("visual_lora_r", "lora_r"),
        ("temper", "steps_are"),
        ("tasks", "betas"),
        ("total_tokens_number", "dataloader_num_workers"),
        ("message_field_rolls", "image_folder"),
    ],
)
def test_suggestions_stay_within_one_topic(name, not_this):
    assert f"did you mean '{not_this}'" not in unknown_setting(name)


def test_misspelled_names_are_guessed():
    for name, setting in [("batchsize", "batch_size"), ("lora_alfa", "lora_alpha"),
                          ("max_step", "max_steps"), ("MAX_LENGTH", "max_length"),
                          ("evaluation_input", "evaluation_inputs")]:  # fmt: skip
        assert f"did you mean '{setting}'" in unknown_setting(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("learningrate", "'learning_rate' of other trainers is lr here"),
        ("LearningRate", "'learning_rate' of other trainers is lr here"),
        ("num_epoch", "'num_epochs' of other trainers is max_epochs here"),
        ("streamin", "'streaming' of other trainers is not available: rows are tokenized once"),
    ],
)
def test_misspelled_names_of_other_trainers_are_guessed(name, told):
    assert told in unknown_setting(name)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("tuning", "dora", r"use 'lora' with lora_config = \{'use_dora': True\}"),
        ("algorithm", "dpo", "preference tuning is not available"),
        ("lr_schedule", "rex", "'rex' is not available"),
        ("device", "npu", "Ascend NPUs are not supported$"),
        ("push_to_hub", True, "give the name of the repository: 'owner/name'"),
        ("report_to", "all", "name each tracker"),
        ("gradient_checkpointing", "unsloth", "set True: layers are recomputed"),
        ("max_epochs", "3", "write it without quotes"),
        ("warmup_steps", 0.1, "a share of the steps is warmup_ratio"),
        ("save_steps", "epoch", "save_epochs = 1 saves at the end of each epoch"),
        ("evaluation_freq", 0.1, "it counts steps; a share of them is not available"),
        ("validation_ratio", 500, "it is a share of the rows; a file of your own is"),
        ("max_epochs", 0.5, "max_steps ends a run within an epoch"),
        ("tuning", "galore", "'galore' is not available; 'qlora' and an 8-bit"),
        ("prompt_template", "deepseek3", "'auto' is the template of the tokenizer$"),
        ("prompt_template", "qwen3", "'auto' is the template of the tokenizer$"),
        ("dataset_format", "messages", "use 'openai', or 'auto'$"),
        ("gradient_checkpointing", "true", "write it without quotes"),
    ],
)
def test_values_without_a_counterpart_say_what_to_do(name, value, told):
    with pytest.raises(ConfigError, match=told):
        load_settings({**MODEL, name: value})


def test_optimizers_without_a_counterpart_are_told_which_there_are():
    for value in ("lomo", "GaLore_AdamW", "ao_adamw_fp8"):
        told = no_counterpart("optim_type", value)
        assert told.startswith(f"{value!r} is not available; 'AdamW', 'Muon', and the 8-bit")
    assert "'AdamW8bit' is the smallest" in no_counterpart("optim_type", "ao_adamw_4bit")
    assert no_counterpart("optim_type", "AdamW") is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim_type", "ADAMW_TORCH", "AdamW"),
        ("lora_target_modules", ["all"], ("all-linear",)),
        ("lora_modules_to_save", "embed_tokens,lm_head", ("embed_tokens", "lm_head")),
        ("lora_modules_to_save", "embed_tokens", ("embed_tokens",)),
        ("report_to", "none", ()),
        ("report_to", ["none"], ()),
        ("report_to", "wandb,mlflow", ("wandb", "mlflow")),
        ("max_steps", -1, None),
        ("max_norm", 0.0, None),
        ("save_total_limit", None, -1),
        ("push_to_hub", False, None),
        ("tuning", "QLoRA", "qlora"),
        ("algorithm", "SFT", "sft"),
        ("dtype", None, "auto"),
        ("quantization", 4, "nf4"),
        ("strategy", "zero3", "deepspeed_zero3"),
        ("best_metric", "eval_loss", "val_loss"),
        ("dataset_format", "chat_template", ("auto",)),
        ("optim_type", "adamw_torch", "AdamW"),
        ("optim_type", "paged_adamw_8bit", "PagedAdamW8bit"),
        ("lora_target_modules", "all", ("all-linear",)),
        ("lora_target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("max_epochs", 3.0, 3),
        ("batch_size", 8.0, 8),
        ("lr", 1, 1),
        ("dtype", "bf16", "bfloat16"),
        ("lr_schedule", "constant_with_warmup", "constant"),
        ("overlong", "raise", "error"),
        ("algorithm", "cpt", "pretrain"),
    ],
)
def test_values_are_taken_for_what_they_mean(name, value, expected):
    assert getattr(load_settings({**MODEL, **more(name), name: value}).settings, name) == expected
    assert own_value("data_path", "a,b") == "a,b"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("adapter", None, "use tuning = 'full'"),
        ("load_in_4bit", False, "use tuning = 'lora' or 'full' for weights that are not"),
        ("load_in_8bit", False, "is off; remove it"),
        ("quantization_bit", None, "is empty; remove it"),
        ("use_qlora", False, "use tuning = 'lora' or 'full'; 'qlora' is the default"),
        ("load_in_4bit", True, "use tuning = 'qlora', or quantization = 'nf4'"),
        ("lora_target_linear", False, "is off; remove it"),
        ("use_dora", False, "is off; remove it"),
        ("wandb_project", "", "is empty; remove it"),
        ("special_tokens", None, "is empty; remove it"),
        ("full_finetuning", False, "is off; remove it"),
        ("sample_packing", False, "use pack_to_max_length"),
        ("disable_shuffling", False, "use shuffle = True, the default"),
        ("train_on_inputs", False, "is not available: only assistant turns are trained on; alg"),
        ("learning_rate", 0, "use lr"),
    ],
)
def test_names_that_are_off_or_empty_are_not_taken_for_on(name, value, told):
    assert unknown_setting(name, value).startswith(told)
    with pytest.raises(ConfigError) as caught:
        load_settings({**MODEL, name: value})
    assert f"{name} = {value!r}   {told}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("max_iters", "optimizer steps"),
        ("save_interval", "optimizer steps"),
        ("evals_per_epoch", "counts steps: the steps of an epoch"),
        ("saves_per_epoch", "counts steps: the steps of an epoch"),
        ("max_samples", "all sources together"),
        ("train_batch_size", "per device and micro-batch"),
        ("min_lr", "a share of lr"),
        ("finetune_language_layers", "its inverse"),
    ],
)
def test_advice_names_the_unit_where_it_differs(name, unit):
    assert unit in advice(name)


def test_number_with_a_fraction_is_no_integer():
    with pytest.raises(ConfigError, match=r"max_epochs = 2\.5 +must be 'auto', or an integer"):
        load_settings({**MODEL, "max_epochs": 2.5})


def test_setting_under_another_name_is_not_missing():
    with pytest.raises(ConfigError) as caught:
        load_settings({"base_model": "m", "datasets": "d.jsonl", "max_seq_len": 9})
    message = str(caught.value)
    assert "use pretrained_model_name_or_path" in message and "use data_path" in message
    assert "missing" not in message


def test_explain_takes_names_of_other_trainers():
    from xtuner.config.explain import explain

    text = explain("learning_rate")
    assert text.startswith("learning_rate: use lr\n\nlr\n") and "default" in text
    assert explained_as("fsdp") is None
    assert explain("fsdp") == "fsdp: is not a setting; strategy = 'fsdp2' shards weights"
