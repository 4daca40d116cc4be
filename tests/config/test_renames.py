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


def test_several_hundred_names_are_known_and_none_is_a_setting():
    assert len(KNOWN) > 380
    assert not set(KNOWN) & set(field_parts())


@pytest.mark.parametrize("name", KNOWN)
def test_advice_names_settings_that_exist(name):
    text = advice(name)
    if text.startswith("use "):
        assert replaced_by(name), text
    named = re.findall(r"\b([a-z]+(?:_[a-z]+)+) = ", text)
    assert set(named) <= set(field_parts()), text


def test_every_argument_of_transformers_is_known():
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
    ("name", "value", "expected"),
    [
        ("optim_type", "adamw_torch", "AdamW"),
        ("optim_type", "paged_adamw_8bit", "PagedAdamW8bit"),
        ("lora_target_modules", "all", ("all-linear",)),
        ("lora_target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("max_epochs", 3.0, 3),
        ("batch_size", 8.0, 8),
        ("lr", 1, 1),
        ("dtype", "bf16", "bfloat16"),
        ("lr_schedule", "constant_with_warmup", "constant"),
    ],
)
def test_values_are_taken_for_what_they_mean(name, value, expected):
    assert getattr(load_settings({**MODEL, name: value}).settings, name) == expected
    assert own_value("data_path", "a,b") == "a,b"


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
    with pytest.raises(ConfigError, match="fsdp: is not a setting; strategy = 'fsdp2'"):
        explain("fsdp")
