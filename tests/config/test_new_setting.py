"""A new setting is described in one place, its field. Everything else follows from its marks."""

from typing import Annotated

import pytest

from xtuner.config.explain import explain
from xtuner.config.load import LoadedSettings
from xtuner.config.marks import Mark, Options, Positive
from xtuner.config.parts import Part
from xtuner.config.render import render, render_all
from xtuner.config.schema import Settings


class ServePart(Part):
    """PART 6  Serving"""

    port: Annotated[Positive, Mark("free", comment="of the server", idle=lambda s: not s.page)] = 80
    """Port of the server. Below 1024 it takes rights."""
    page: Annotated[str | None, Mark("noted", is_path=True, comment="")] = None
    """A page to serve."""
    blocks: Annotated[Positive, Mark("fixed")] = 4
    """Blocks of the model."""
    careful: int = 1
    """Without any mark."""
    limits: Annotated[Options, Mark("free", comment="by name")] = ()
    """Limits by name."""


class Extended(Settings, ServePart):
    """The settings with a part that is unknown to other modules."""


REQUIRED = {"pretrained_model_name_or_path": "model", "data_path": ("data.jsonl",)}


def extended(**values):
    return Extended(**REQUIRED, **values)


def test_resume_compares_what_is_marked():
    from xtuner.engine.resume import completed, identity_of

    identity = identity_of(extended(blocks=5), "", processes=1, dtype="float32")
    assert identity["blocks"] == 5 and identity["careful"] == 1 and "page" in identity
    assert not {"port", "limits"} & {*identity}
    assert completed({}, Extended)["blocks"] == 4  # of a checkpoint from before the setting
    assert completed({"blocks": 7}, Extended)["blocks"] == 7


def test_a_resume_is_refused_where_a_fixed_setting_changed(tmp_path):
    from xtuner.engine.resume import check_shape
    from xtuner.errors import CheckpointError
    from xtuner.models.run_info import RunInfo

    settings = extended(port=1, careful=2)
    info = RunInfo("model", "model", prompt_template="auto", settings=settings.model_dump())
    info.write(tmp_path)
    check_shape(tmp_path, extended(port=2, careful=3))
    with pytest.raises(CheckpointError, match="blocks: 4 then, 5 now"):
        check_shape(tmp_path, extended(blocks=5))


def test_a_resume_takes_the_settings_that_the_run_wrote(tmp_path):
    """They have absolute paths, and name the copies of the user's files."""
    from xtuner.config.schema import Settings
    from xtuner.engine.resume import check_shape, same
    from xtuner.errors import CheckpointError
    from xtuner.models.run_info import RunInfo

    assert same(["d.jsonl"], ["/at/d.jsonl"], of_names=True)
    assert not same(["d.jsonl"], ["/at/e.jsonl"], of_names=True)
    model = tmp_path / "model"
    model.mkdir()

    def settings(path, algorithm):
        return Settings(pretrained_model_name_or_path=path, data_path=("d",), algorithm=algorithm)

    written = settings("model", "code/a.py:A").model_dump()
    RunInfo("adapter", str(model), prompt_template="auto", settings=written).write(tmp_path)
    check_shape(tmp_path, settings(str(model), "user_code/a.py:A"))
    elsewhere = str(tmp_path / "elsewhere" / "model")
    for other in (settings(elsewhere, "a.py:A"), settings(str(model), "user_code/a.py:B")):
        with pytest.raises(CheckpointError, match="with other settings"):
            check_shape(tmp_path, other)


def test_a_copied_file_shows_it_with_its_comment():
    text = render({**REQUIRED, "page": "x.html"}, title="T", kind=Extended)
    assert "# PART 6  Serving" in text
    assert text.splitlines()[-3].split() == ["port", "=", "80", "#", "of", "the", "server"]
    assert "page = 'x.html'\n" in text and "limits = {}" in text
    assert "blocks" not in text and "careful" not in text
    assert "port" not in render(REQUIRED, title="T", kind=Extended)  # without effect
    assert "careful = 5" in render({**REQUIRED, "careful": 5}, title="T", kind=Extended)


def test_the_record_of_a_run_has_all_and_absolute_paths(tmp_path):
    pytest.importorskip("torch")  # absent in `make test-python`
    from xtuner.engine.kept_settings import keep_settings

    (tmp_path / "x.html").write_text("")
    loaded = LoadedSettings(extended(page="x.html", limits={"a": 1}), "run", tmp_path, None)
    keep_settings(loaded, tmp_path)
    text = (tmp_path / "run.py").read_text()
    assert f"page = {str(tmp_path / 'x.html')!r}" in text
    assert "limits = {'a': 1}" in text and "careful = 1" in text
    assert text.endswith(render_all(loaded.settings, title="").split("\n")[-2] + "\n")


def test_it_is_explained():
    text = explain("port", Extended)
    assert "an integer, 1 or more" in text
    assert "default  80" in text and "PART 6  Serving" in text and "Port of the server." in text


def test_without_effect_is_told_of_what_was_given():
    assert "port" in extended(port=3).without_effect()
    assert "port" not in extended().without_effect()
    assert "port" not in extended(port=3, page="x").without_effect()


def test_the_settings_themselves_do_not_know_it():
    assert "port" not in Settings.model_fields and "port" not in Settings.on_resume("free")
