"""What an earlier run left in a work dir, and what a new start makes of it."""

import pytest

from xtuner.config.load import load_settings
from xtuner.engine.earlier_run import AUTO, LAST, claim, refuse_nothing_to_resume
from xtuner.engine.kept_settings import keep_settings
from xtuner.errors import CheckpointError

NEEDED = {"pretrained_model_name_or_path": "m", "data_path": "d.jsonl"}


def settings(**given):
    return load_settings({**NEEDED, **given})


@pytest.fixture
def work_dir(tmp_path):
    (tmp_path / "w").mkdir()
    return tmp_path / "w"


@pytest.mark.parametrize("resume", [LAST, AUTO])
def test_checkpoints_are_resumed(work_dir, resume):
    (work_dir / ".iter_5.replaced").mkdir()  # killed while it was saved again
    refuse_nothing_to_resume(work_dir, settings())
    assert not claim(work_dir, settings(), resume=resume, overwrite=False)
    assert [path.name for path in work_dir.iterdir()] == ["iter_5"]


def test_a_run_that_saved_nothing_is_started_again(work_dir):
    assert claim(work_dir, settings(lr=1e-3), resume=None, overwrite=False)
    refuse_nothing_to_resume(work_dir, settings(lr=1e-3))
    assert claim(work_dir, settings(lr=1e-3), resume=LAST, overwrite=False)
    with pytest.raises(CheckpointError, match="no run of these settings has started there"):
        claim(work_dir, settings(lr=2e-3), resume=LAST, overwrite=False)
    assert claim(work_dir, settings(lr=2e-3), resume=AUTO, overwrite=False)


def test_a_settings_file_in_the_work_dir_is_recognized(work_dir):
    file = work_dir / "mine.py"
    file.write_text("pretrained_model_name_or_path = 'm'\ndata_path = 'd.jsonl'\n")
    loaded = load_settings(str(file))
    with pytest.raises(CheckpointError, match="contains no checkpoint to resume from"):
        refuse_nothing_to_resume(work_dir, loaded)
    keep_settings(loaded, work_dir)
    refuse_nothing_to_resume(work_dir, loaded)


def test_a_new_run_does_not_touch_an_earlier_one(work_dir):
    keep_settings(settings(), work_dir)
    before = {path.name: path.read_bytes() for path in work_dir.iterdir()}
    (work_dir / "iter_5").mkdir()
    with pytest.raises(CheckpointError, match="contains iter_5 of an earlier run"):
        claim(work_dir, settings(lr=1.0), resume=None, overwrite=False)
    assert not claim(work_dir, settings(lr=1.0), resume=None, overwrite=True)
    assert {p.name: p.read_bytes() for p in work_dir.iterdir() if p.is_file()} == before


def test_a_look_at_an_earlier_run_writes_nothing(work_dir):
    here = work_dir.parent
    (here / "mine.py").write_text("A = 1\n")
    (here / "sub").mkdir()
    (here / "sub" / "mine.py").write_text("B = 2\n")
    hooks = {"dataset_format": "mine.py:A", "custom_hooks": ["sub/mine.py:B"]}
    lines = [f"{name} = {value!r}" for name, value in {**NEEDED, **hooks}.items()]
    (here / "settings.py").write_text("\n".join(lines))
    loaded = load_settings(str(here / "settings.py"))
    (work_dir / "settings.py").write_text("of another run")
    before = sorted(here.rglob("*"))
    with pytest.raises(CheckpointError, match="no run of these settings has started there"):
        refuse_nothing_to_resume(work_dir, loaded)
    assert sorted(here.rglob("*")) == before
    keep_settings(loaded, work_dir)
    refuse_nothing_to_resume(work_dir, loaded)
    (here / "mine.py").write_text("A = 3\n")
    with pytest.raises(CheckpointError, match="no run of these settings has started there"):
        refuse_nothing_to_resume(work_dir, loaded)
