"""A checkpoint with a template of the user's own: chat needs no file, and runs none."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from xtuner import templates
from xtuner.chat.opening import open_chat
from xtuner.errors import CheckpointError, ModelError
from xtuner.models.run_info import RunInfo
from xtuner.templates.spec import Spec
from xtuner.testing.tiny import tiny_tokenizer

CODE = """
from pathlib import Path
from xtuner.templates.spec import Spec

Path(r"{mark}").write_text("ran")
MINE = Spec(user="Q: {{content}}\\n", assistant="A:", system="{{content}}\\n", stop_words=("Q:",))
"""


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A Python file that leaves a mark when it runs, and the mark."""
    file, mark = tmp_path / "x.py", tmp_path / "mark"
    file.write_text(CODE.format(mark=mark))
    return file, mark


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A model folder that xtuner wrote; its run.yaml is added by the test."""
    folder = tmp_path / "iter_5"
    folder.mkdir()
    for file in Path(tiny_model_path).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("form", ["absolute", "relative", "up"])
def test_checkpoint_code_runs_only_when_trusted(
    form, planted, checkpoint, monkeypatch, caplog
) -> None:
    file, mark = planted
    (checkpoint.parent / "in").mkdir()
    monkeypatch.chdir(checkpoint.parent / ("in" if form == "up" else "."))
    name = {"absolute": str(file), "relative": "x.py", "up": "../x.py"}[form]
    RunInfo("model", "base", prompt_template=f"{name}:MINE").write(checkpoint)
    with pytest.raises(ModelError, match=r"x\.py, which is not run.*--trust-code"):
        open_chat(checkpoint, dtype="float32")
    assert not mark.exists()
    open_chat(checkpoint, dtype="float32", trust_code=True)
    assert mark.exists()
    assert "x.py" in caplog.text


def test_the_command_line_is_trusted(planted, checkpoint) -> None:
    file, mark = planted
    RunInfo("model", "base").write(checkpoint)
    open_chat(checkpoint, dtype="float32", prompt_template=f"{file}:MINE")
    assert mark.exists()


def test_a_checkpoint_carries_the_template_as_data(planted, checkpoint) -> None:
    file, mark = planted
    name = f"{file}:MINE"
    trained_with = templates.load(name, tiny_tokenizer())
    info = RunInfo("model", "b", prompt_template=name, template=trained_with.as_fields())
    info.write(checkpoint)
    file.unlink()
    mark.unlink()
    session = open_chat(checkpoint, dtype="float32")
    assert session.template.fingerprint() == trained_with.fingerprint()
    assert session.template.stop_words == trained_with.stop_words
    assert not mark.exists()


def test_a_built_in_template_is_not_copied_into_the_checkpoint() -> None:
    assert templates.load("chatml", tiny_tokenizer()).as_fields() == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": 3}, "user: must be a string"),
        ({"shell": "x"}, "no field 'shell'"),
        ({"stop_words": "Q:"}, "stop_words: must be a list"),
        ({"user": "{content}" * 5000}, "longer than"),
        ({"answer": "x"}, "must contain"),
    ],
    ids=["type", "unknown", "text-for-list", "long", "unsound"],
)
def test_fields_that_are_no_template_are_named(change, words) -> None:
    sound = dataclasses.asdict(Spec(user="{content}", assistant="A", system="{content}"))
    assert Spec.from_fields(sound).user == "{content}"
    with pytest.raises(ValueError, match=words):
        Spec.from_fields(sound | change)


@pytest.mark.parametrize(
    "text",
    ["kind: [1]", "kind: other\nbase_model: m", "a: !!int ''", "- 1", "settings: 3", "[" * 600],
    ids=["type", "kind", "tag", "list", "settings", "deep"],
)
def test_a_damaged_run_file_is_one_line(text, tmp_path) -> None:
    if text.startswith("settings"):
        text = yaml.safe_dump({"kind": "model", "base_model": "m", "settings": 3})
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.yaml"):
        RunInfo.read(tmp_path)
