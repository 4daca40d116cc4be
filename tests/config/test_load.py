"""Loading: files, names, overrides, and one error that lists every problem."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from xtuner.config.load import load_settings
from xtuner.config.read.foreign import offer
from xtuner.errors import ConfigError

NEEDED = "pretrained_model_name_or_path = 'm'\ndata_path = 'a.jsonl'\n"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides, ending=".py"):
        path = tmp_path / f"my_run{ending}"
        path.write_text(text, encoding="utf-8")
        return load_settings(path, overrides=overrides)

    return load


@pytest.fixture
def problems(load):
    def problems(text, *overrides, ending=".py"):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, ending=ending)
        return str(caught.value).splitlines()

    return problems


def test_loads_a_python_file(load, tmp_path):
    loaded = load(NEEDED + "lr = 1e-4\nevaluation_inputs = ['q']\n")
    assert loaded.settings.lr == 1e-4
    assert loaded.settings.data_path == ("a.jsonl",)
    assert loaded.settings.evaluation_inputs == ("q",)
    assert (loaded.name, loaded.folder) == ("my_run", tmp_path)
    assert loaded.path == tmp_path / "my_run.py"
    with pytest.raises(ValidationError):
        loaded.settings.lr = 3.0


@pytest.mark.parametrize("ending", [".yaml", ".yml"])
def test_yaml_gives_the_same_settings(load, ending):
    python = load(NEEDED + "lr = 1e-4\nbetas = (0.9, 0.95)\nmax_steps = None").settings
    text = (
        "pretrained_model_name_or_path: m\ndata_path: a.jsonl\n"
        "lr: 1e-4\nbetas: [0.9, 0.95]\nmax_steps: null\n"
    )
    assert load(text, ending=ending).settings == python


def test_loads_a_built_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = load_settings("internlm2_1_8b_qlora_alpaca_e3", overrides=["data_path=tatsu-lab/x"])
    assert loaded.settings.pretrained_model_name_or_path == "internlm/internlm2-1_8b"
    assert loaded.settings.data_path == ("tatsu-lab/x",)
    assert (loaded.name, loaded.folder, loaded.path) == (
        "internlm2_1_8b_qlora_alpaca_e3",
        Path.cwd(),
        None,
    )


def test_lists_every_problem_at_once_aligned_and_with_lines(problems):
    lines = problems(
        NEEDED + "max_lenght = 512\ntuning = 'qlroa'\nlr = '1e-4'\nmax_epochs = 2.5\nimport re\n",
        "betas=3",
        "lora=1",
    )
    assert lines[0].startswith("7 problems in ")
    assert lines[0].endswith("my_run.py")
    assert lines[1:] == [
        "  line 3  max_lenght = 512   unknown setting; did you mean 'max_length'?",
        "  line 4  tuning = 'qlroa'   must be one of 'full', 'lora', 'qlora'; "
        "did you mean 'qlora'?",
        "  line 5  lr = '1e-4'        must be a number above 0; write it without quotes",
        "  line 6  max_epochs = 2.5   must be 'auto', or an integer, 1 or more",
        "  line 7  import re          a settings file is read, not executed; "
        'put your function in a file and name it as "my_file.py:function"',
        "  --set betas=3              must be two numbers, each a number >= 0 and < 1",
        "  --set lora=1               use tuning = 'lora', with lora_r, lora_alpha "
        "and lora_dropout",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("algorithm = 'qlora'", "'qlora' is a value of 'tuning'"),
        ("tuning = 'sft'", "'sft' is a value of 'algorithm'"),
        ("algorithm = 'stf'", "did you mean 'sft'"),
        ("dataset_format = ['alpacca']", "did you mean 'alpaca'"),
        ("prompt_template = 'internlm2chat'", "did you mean 'internlm2_chat'"),
        ("system = 'x'", "use SYSTEM"),
        ("Max_Length = 3", "did you mean 'max_length'"),
        ("alpaca_en_path = 'x'", "use data_path"),
        ("use_varlen_attn = True", "never attend to each other"),
        ("max_length = 4", "an integer, 8 or more"),
        ("warmup_ratio = 1.5", "a number from 0 to 1"),
        ("pack_to_max_length = 1", "True or False"),
        ("lr = 1e999", "a number above 0"),
        ("data_repeats = 2", "a list of numbers, or None"),
        ("evaluation_inputs = 3", "a string or a list of strings"),
        ("save_total_limit = 0", "-1, or an integer, 1 or more"),
        ("gradient_checkpointing = 'yes'", "'auto', or True or False"),
        ("data_path = []", "is empty"),
        ("data_repeats = [1.0, 2.0]", "2 entries, but data_path has 1"),
        ("data_weights = [0.0]", "at least one above 0"),
        ("quantization = 'none'", "tuning = 'qlora' needs quantized weights"),
        ("sequence_parallel_size = 0", "an integer, 1 or more"),
        ("overlong = 'split'", "supports 'auto', 'truncate', 'drop', 'error'"),
    ],
)
def test_each_wrong_setting_is_named_with_its_line_and_hint(problems, line, message):
    headline, problem = problems(f"{NEEDED}{line}\n")
    assert headline.startswith("1 problem in ")
    assert problem.startswith(f"  line 3  {line.split(' = ')[0]} = ")
    assert message in problem


def test_user_object_is_not_treated_as_a_misspelling(load):
    text = NEEDED + "dataset_format = 'my.py:rows'\nalgorithm = 'a/b.py:Mine'"
    assert load(text).settings.dataset_format == ("my.py:rows",)


def test_missing_settings_are_named(problems):
    lines = problems("lr = 1e-3\n")
    assert [line.split()[0] for line in lines[1:]] == [
        "pretrained_model_name_or_path",
        "data_path",
    ]
    assert "is missing" in lines[1]


def test_a_setting_that_could_not_be_read_is_not_called_missing(problems):
    assert len(problems("pretrained_model_name_or_path = 'm'\ndata_path = glob('x')\n")) == 2


def test_combinations_are_checked_beside_other_problems(problems):
    lines = problems(NEEDED + "lr = -1\nattn_implementation = 'sdpa'\nsequence_parallel_size = 2\n")
    assert len(lines) == 3
    assert "sequence_parallel_size = 2" in lines[2]


def test_a_combination_with_a_wrong_member_is_left_out(problems):
    # With tuning's default in place of 'qlroa', quantization = 'none' would look wrong as well.
    lines = problems(NEEDED + "tuning = 'qlroa'\nquantization = 'none'\n")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("lr=1e-4", "lr", 1e-4),
        ("max_steps=None", "max_steps", None),
        ("max_steps=null", "max_steps", None),
        ("pack_to_max_length=false", "pack_to_max_length", False),
        ("gradient_checkpointing=True", "gradient_checkpointing", True),
        ("evaluation_inputs=['a','b']", "evaluation_inputs", ("a", "b")),
        ("evaluation_inputs=Who are you?", "evaluation_inputs", ("Who are you?",)),
        ("betas=(0.9,0.95)", "betas", (0.9, 0.95)),
        ("SYSTEM=a=b", "SYSTEM", "a=b"),
        ("work_dir=123", "work_dir", "123"),
        ("data_path=b.jsonl", "data_path", ("b.jsonl",)),
        ("SYSTEM=", "SYSTEM", ""),
    ],
)
@pytest.mark.parametrize("ending", [".py", ".yaml"])
def test_overrides_are_typed_by_the_schema(load, override, name, value, ending):
    text = NEEDED if ending == ".py" else NEEDED.replace(" =", ":")
    assert getattr(load(text, override, ending=ending).settings, name) == value


def test_the_word_none_is_a_value_where_the_setting_has_it(load):
    settings = load(NEEDED, "quantization=none", "tuning=lora").settings
    assert settings.quantization == "none"


def test_an_override_replaces_a_value_that_is_wrong_or_cannot_be_read(load):
    text = NEEDED + "lr = get_lr()\nmax_length = 'long'\n"
    settings = load(text, "lr=1e-3", "max_length=512").settings
    assert (settings.lr, settings.max_length) == (1e-3, 512)


def test_the_last_override_wins(load):
    assert load(NEEDED, "lr=1e-3", "lr=1e-2").settings.lr == 1e-2


def test_overrides_have_their_own_problems(problems):
    lines = problems(NEEDED, "max_lenght=3", "nonsense", "lr=fast")
    assert {line.split("   ")[0].strip() for line in lines[1:]} == {
        "--set max_lenght=3",
        "--set nonsense",
        "--set lr=fast",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", "no such file"),
        ("notes.txt", "must end in .py, .yaml or .yml"),
        ("folder", "is a folder"),
        ("latin.py", "not UTF-8"),
        ("internlm2_1_8b_qlora_alpca_e3", "did you mean internlm2_1_8b_qlora_alpaca_e3?"),
        ("nonsense", "xtuner list-cfg -p"),
    ],
)
def test_a_config_that_cannot_be_found_or_read(tmp_path, monkeypatch, name, message):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.py").write_bytes("SYSTEM = 'ä'".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=name) as caught:
        load_settings(name)
    assert message in str(caught.value)


def test_a_byte_order_mark_and_dos_lines_are_read(tmp_path):
    path = tmp_path / "run.py"
    path.write_bytes(b"\xef\xbb\xbf" + (NEEDED + "x = 1\n").replace("\n", "\r\n").encode())
    with pytest.raises(ConfigError, match="line 3  x = 1"):
        load_settings(path)


@pytest.mark.parametrize(
    ("text", "ending", "origin"),
    [
        ("from mmengine.config import read_base\nlr = 1e-4\n", ".py", "XTuner 0.x"),
        ("lr = 1e-4\nmodel = dict(type='xtuner.model.SupervisedFinetune')\n", ".py", "XTuner 0.x"),
        ("stage: sft\nfinetuning_type: lora\n", ".yaml", "LLaMA-Factory"),
        ("model:\n  _component_: torchtune.models.llama3.llama3_8b\n", ".yaml", "torchtune"),
    ],
    ids=["imports", "dumped", "llamafactory", "torchtune"],
)
def test_a_config_of_another_trainer_gets_the_command_that_migrates_it(load, text, ending, origin):
    with pytest.raises(ConfigError) as caught:
        load(text, ending=ending)
    message = str(caught.value)
    assert f"is a config of {origin}" in message
    assert "xtuner migrate-cfg" in message and "xtuner train --migrate" in message
    assert "is missing" not in message
    assert "`xtuner migrate-cfg 'my configs/a.yaml'`" in offer("my configs/a.yaml", origin)


def test_settings_file_is_not_mistaken_for_another_trainers_config(load):
    assert load(NEEDED + "lora_r = 8\nwork_dir = 'mmengine'\n").settings.lora_r == 8
    yaml = "pretrained_model_name_or_path: m\ndata_path: a.jsonl\nmax_length: 64\n"
    assert load(yaml, ending=".yaml").settings.max_length == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mine", "is no built-in name; did you mean the file mine.py"),
        ("mine.yaml", "no such file .*; did you mean 'mine.py'"),
        ("other.py", "no such file .*; `xtuner copy-cfg NAME FOLDER` creates one"),
        ("notes.txt", "must end in .py, .yaml or .yml; rename it to .py if"),
        ("gbk.py", "gbk.py line 2: is not UTF-8; save the file as UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "notes.txt"):
        Path(name).write_text("lr = 1\n")
    Path("gbk.py").write_bytes("lr = 1\nSYSTEM = '你好'\n".encode("gbk"))
    with pytest.raises(ConfigError, match=words):
        load_settings(given)


def test_a_folder_that_cannot_be_listed_is_no_fault_of_the_file_in_it(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.py").write_text(NEEDED)
    monkeypatch.setattr(Path, "iterdir", refused)
    assert load_settings(tmp_path / "mine.py").settings.data_path
    for missing in ("other.py", "other"):
        with pytest.raises(ConfigError, match=r"no such file|no settings file or built-in"):
            load_settings(str(tmp_path / missing))
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load_settings(tmp_path / "mine.py")
