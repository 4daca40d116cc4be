"""The form shows every setting, and makes the settings that it shows."""

import re

import pytest

from xtuner import i18n
from xtuner.config.builtin import catalog
from xtuner.config.describe import allowed
from xtuner.config.load import load_settings
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError
from xtuner.web import form
from xtuner.web.folders import Folders

CHANGED = {
    "pretrained_model_name_or_path": "org/model",
    "data_path": ["a.jsonl", "b.csv"],
    "tuning": "full",
    "lr": 3e-5,
    "betas": (0.9, 0.95),
    "max_norm": None,
    "gradient_checkpointing": True,
    "shuffle": False,
    "max_steps": 7,
    "data_weights": [1.0, 2.0],
    "evaluation_inputs": ["Who are you?", "它是什么?"],
    "save_steps": 11,
    "SYSTEM": "Be 'kind'.",
    "save_total_limit": -1,
}


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "runs").mkdir()
    return Folders.of(tmp_path / "runs", [tmp_path])


def test_every_setting_is_in_the_form():
    names = [field.name for field in form.fields()]
    assert sorted(names) == sorted(Settings.model_fields)
    assert all(field.help and field.part for field in form.fields())
    assert {field.kind for field in form.fields()} == {"switch", "choice", "text", "lines", "value"}


def test_every_text_of_the_form_is_in_chinese():
    words = i18n.words("zh")
    english, chinese = form.fields(), form.fields(words)
    for one, other in zip(english, chinese, strict=True):
        assert one.name == other.name and one.kind == other.kind
        assert _is_chinese(other.help) and _is_chinese(other.part), one.name
        if one.kind not in ("switch", "choice"):
            assert other.help.endswith("）") and allowed(one.name) not in other.help
    table = i18n.settings_table()
    assert sorted(table["settings"]) == sorted(Settings.model_fields)
    parts = {field.part for field in english}
    assert set(table["parts"]) == parts
    stated = {allowed(f.name) for f in english if f.kind not in ("switch", "choice")}
    assert set(table["values"]) == stated


def test_every_string_of_the_page_is_in_chinese():
    for key, row in i18n.table().items():
        assert _names(row["en"]) == _names(row["zh"]), key
        text = re.sub(r"[{].*?[}]", "", row["zh"])
        same = {"page_title", "chat_top_p", "other_language", "step_of",
                "train_values"}  # fmt: skip
        assert _is_chinese(text) or key in same, key


def _is_chinese(text):
    return re.search("[\u4e00-\u9fff]", text) is not None


def _names(text):
    return sorted(re.findall("[{](.*?)(?::.*?)?[}]", text))


def test_what_the_form_shows_is_what_it_makes(tmp_path):
    shown = form.controls_of(CHANGED)
    assert all(isinstance(value, bool | str) for value in shown)
    values = form.values_of(shown)
    assert load_settings(values).settings == load_settings(CHANGED).settings
    assert set(values) == set(CHANGED)
    file = tmp_path / "settings.py"
    file.write_text(form.settings_file(values, "mine"), encoding="utf-8")
    assert load_settings(file).settings == load_settings(CHANGED).settings


def test_a_setting_of_a_word_or_a_number_takes_both():
    field = next(field for field in form.fields() if field.name == "max_epochs")
    assert (form.shown(field, "auto"), form.shown(field, 4)) == ("auto", "4")
    assert (form.read(field, " auto "), form.read(field, "4")) == ("auto", 4)


def test_settings_of_a_built_in_survive_the_form():
    values = catalog.compose("smollm2_135m_instruct_qlora_custom_e3")
    again = form.values_of(form.controls_of(values))
    assert load_settings(again).settings == load_settings(values).settings


def test_all_that_is_no_value_is_listed():
    shown = form.controls_of(CHANGED)
    names = [field.name for field in form.fields()]
    shown[names.index("lr")], shown[names.index("max_steps")] = "fast", "__import__('os')"
    with pytest.raises(ConfigError, match=r"max_steps(.|\n)*lr = 'fast'"):
        form.values_of(shown)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("data_path", ["/etc/passwd"], "outside the folders"),
        ("data_path", ["../../secret.jsonl"], "outside the folders"),
        ("pretrained_model_name_or_path", "~/model", "outside the folders"),
        ("custom_hooks", ["evil.py:Hook"], "runs a Python file"),
        ("algorithm", "evil.py:Algorithm", "runs a Python file"),
        ("dataset_format", ["evil.py:read"], "runs a Python file"),
        ("prompt_template", "evil.py:T", "runs a Python file"),
        ("trust_remote_code", True, "runs code of the model"),
        ("attn_implementation", "someone/kernel", "runs code from the hub"),
        ("strategy", "/etc/deepspeed.json", "outside the folders"),
        ("work_dir", "/tmp/x", "work_dir"),
        ("no_such_setting", 1, "no_such_setting"),
    ],
    ids=["absolute", "up", "home", "hook", "algorithm", "format", "template", "remote", "kernel",
         "strategy", "work dir", "unknown"],
)  # fmt: skip
def test_settings_that_leave_the_folders_or_run_code_are_refused(folders, name, value, words):
    values = {"pretrained_model_name_or_path": "org/model", "data_path": ["rows.jsonl"]}
    form.checked(values, folders)
    with pytest.raises(ConfigError, match=words):
        form.checked({**values, name: value}, folders)
