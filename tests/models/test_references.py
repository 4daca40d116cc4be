"""Which checkpoint a path refers to, also when the file that names it is damaged or out of date."""

import pytest

from xtuner.models.references import checkpoint_of


@pytest.fixture
def work_dir(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"iter_{step}").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"iter_9\n", "iter_9"),
        (b"/old/place/iter_2\n", "iter_2"),
        (b"iter_11\n", "iter_10"),
        (b"", "iter_10"),
        (b"\xff\xfe", "iter_10"),
    ],
    ids=["named", "moved", "deleted", "empty", "damaged"],
)
def test_work_dir_is_its_last_checkpoint(work_dir, content, name):
    (work_dir / "last_checkpoint").write_bytes(content)
    assert checkpoint_of(work_dir) == work_dir / name


def test_best_checkpoint_is_never_another_one(work_dir):
    file = work_dir / "best_checkpoint"
    file.write_bytes(b"iter_2 val_loss 0.5\n")
    assert checkpoint_of(file) == work_dir / "iter_2"
    file.write_bytes(b"iter_3 val_loss 0.5\n")
    assert not checkpoint_of(file).exists()
    assert checkpoint_of(work_dir) == work_dir  # without last_checkpoint: no work dir


def test_work_dir_without_checkpoints_has_none(tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(b"iter_5\n")
    assert not checkpoint_of(tmp_path).exists()
