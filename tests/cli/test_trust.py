"""Third-party code runs only with a flag on the command line."""

import pytest

from xtuner.cli import _settings
from xtuner.cli.app import main
from xtuner.errors import ConfigError
from xtuner.hub import trust


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A machine on which the user has not trusted anything."""
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tmp_path, tiny_model_path):
    """A settings file in a folder of its own."""
    (tmp_path / "d.jsonl").write_text('{"input": "a", "output": "b"}\n')

    def write(folder, *lines):
        folder.mkdir(exist_ok=True)
        text = [f"pretrained_model_name_or_path = {str(tiny_model_path)!r}",
                f"data_path = {str(tmp_path / 'd.jsonl')!r}", *lines]  # fmt: skip
        (folder / "c.py").write_text("\n".join(text) + "\n")
        return str(folder / "c.py")

    return write


def test_code_of_a_model_needs_the_flag_once(config, tmp_path, capsys):
    file = config(tmp_path / "mine", "trust_remote_code = True")
    with pytest.raises(ConfigError, match="once per machine"):
        _settings.load(file, overrides=())
    assert _settings.load(file, overrides=(), trust_remote_code=True).settings.trust_remote_code
    assert _settings.load(file, overrides=()).settings.trust_remote_code
    assert capsys.readouterr().err.count("(trust_remote_code)") == 2


def test_another_model_asks_again_and_the_command_line_is_trusted(config, tmp_path):
    file = config(tmp_path / "mine", "trust_remote_code = True")
    _settings.load(file, overrides=(), trust_remote_code=True)
    other = ["pretrained_model_name_or_path=other/model"]
    with pytest.raises(ConfigError, match="lets the model other/model"):
        _settings.load(file, overrides=other)
    _settings.load(config(tmp_path / "plain"), overrides=[*other, "trust_remote_code=True"])


def test_file_writable_by_others_is_not_trusted(config, tmp_path, cache):
    file = config(tmp_path / "mine", "trust_remote_code = True")
    _settings.load(file, overrides=(), trust_remote_code=True)
    (cache / "trust.json").chmod(0o666)
    with pytest.raises(ConfigError):
        _settings.load(file, overrides=())


@pytest.mark.parametrize("command", [["check-custom-dataset"], ["train", "--dry-run"]])
def test_checks_and_forecasts_ask_too(command, config, tmp_path, capsys):
    file = config(tmp_path / "mine", "trust_remote_code = True")
    assert main([command[0], file, *command[1:]]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_migrated_settings_are_checked_too(tmp_path, capsys):
    """A config of another trainer, read as it is, with code that the command line adds."""
    old = tmp_path / "sft.yaml"
    old.write_text(
        "stage: sft\ndo_train: true\nmodel_name_or_path: org/model\nfinetuning_type: lora\n"
        "dataset: d\ndataset_dir: .\ntemplate: qwen\n"
    )
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}')
    loaded = _settings.load_any(str(old), overrides=["trust_remote_code=True"])
    assert loaded.settings.trust_remote_code and trust.is_remembered("remote_code", "org/model")
    assert "running Python code of the model org/model" in capsys.readouterr().err


def test_valid_settings_file_gives_no_note(config, tmp_path, capsys):
    _settings.load(config(tmp_path / "mine", "custom_hooks = ['h.py:H']"), overrides=())
    captured = capsys.readouterr()
    assert not captured.err and not captured.out


@pytest.mark.parametrize(
    "line",
    ["prompt_template = 'x.py:T'", "custom_hooks = ['../x.py:H']", "dataset_format = '/x.py:f'",
     "algorithm = 'x.py:A'"],
    ids=["template", "hooks", "format", "algorithm"],
)  # fmt: skip
@pytest.mark.parametrize("mark", ["run.yaml", "last_checkpoint"])
def test_settings_beside_an_unknown_checkpoint_run_no_code(line, mark, config, tmp_path):
    file = config(tmp_path / "theirs", line)
    (tmp_path / "theirs" / mark).write_text("")
    with pytest.raises(ConfigError, match=r"\.py:.*--trust-code"):
        _settings.load(file, overrides=())
    _settings.load(file, overrides=(), trust_code=True)
    _settings.load(config(tmp_path / "theirs"), overrides=[line.replace(" = ", "=")])


def test_own_work_dir_is_trusted(config, tmp_path):
    file = config(tmp_path / "work", "prompt_template = 'x.py:T'")
    (tmp_path / "work" / "last_checkpoint").write_text("iter_1")
    _settings.remember_work_dir(tmp_path / "work")
    _settings.load(file, overrides=())
    assert trust.is_remembered("work_dirs", str((tmp_path / "work").resolve()))
