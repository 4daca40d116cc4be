"""Checkpoints are complete or absent."""

import errno
import os
from functools import partial

import pytest
import torch
from safetensors import SafetensorError

from xtuner.engine import checkpoint
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.training_state import load_state, save_state
from xtuner.errors import CheckpointError, LaunchError
from xtuner.models import folder_swap


def write_text(folder):
    (folder / "weights").write_text("w")
    (folder / checkpoint.STATE_FILE).write_text("s")


def test_the_newest_is_found_and_the_oldest_deleted(tmp_path):
    store = CheckpointStore(tmp_path, limit=2)
    for step in (5, 10, 100):
        store.save(step, write_text)
    assert [p.name for p in store.all()] == ["iter_10", "iter_100"]
    assert store.find().name == "iter_100"
    assert (tmp_path / "last_checkpoint").read_text().strip() == "iter_100"
    assert store.find("iter_10.pth").name == "iter_10"
    assert not list(tmp_path.glob(".*"))


def test_a_path_counts_and_a_name_is_looked_up_in_the_work_dir(tmp_path, monkeypatch):
    work, other = CheckpointStore(tmp_path / "work"), CheckpointStore(tmp_path / "other")
    for store in (work, other):
        store.save(4, write_text)
    monkeypatch.chdir(tmp_path / "other")
    assert work.find("iter_4") == tmp_path / "work" / "iter_4"
    for name in ("iter_4", "iter_4.pth", "iter_4/"):
        assert work.find(f"{tmp_path}/other/{name}") == tmp_path / "other" / "iter_4"
    for name in (f"{tmp_path}/nowhere/iter_4", "../nowhere/iter_4.pth", "iter_5"):
        with pytest.raises(CheckpointError, match="does not exist"):
            work.find(name)


def test_the_alias_of_xtuner_0_comes_and_goes_with_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, limit=2, alias=True)
    for step in (5, 10, 100):
        store.save(step, write_text)
    files = {path.name: path.read_text() for path in tmp_path.glob("*.pth")}
    assert files == {"iter_10.pth": "iter_10\n", "iter_100.pth": "iter_100\n"}
    assert [path.name for path in store.all()] == ["iter_10", "iter_100"]


def test_a_limit_of_one_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, limit=1)
    store.save(1, write_text)
    store.save(2, write_text)
    assert [p.name for p in store.all()] == ["iter_2"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("file write failed: No space left on device"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, fault):
    store = CheckpointStore(tmp_path, limit=1)
    store.save(1, write_text)

    def full(folder):
        write_text(folder)
        raise fault

    with pytest.raises(LaunchError, match=r"No space left.*\n?.*--resume"):
        store.save(2, full)
    assert [p.name for p in store.all()] == ["iter_1"]
    assert not list(tmp_path.glob(".iter*"))


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_lack_of_memory_is_not_taken_for_a_full_disk(tmp_path, fault):
    def short(folder):
        raise fault

    with pytest.raises(LaunchError, match="out of memory") as told:
        CheckpointStore(tmp_path).save(2, short)
    assert "disk space" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_what_a_library_refuses_to_write_is_told_as_what_it_is(tmp_path):
    def refused(folder):
        raise ValueError("The generation config is invalid")

    with pytest.raises(LaunchError, match=r"ValueError: The generation .*the disk is not full"):
        CheckpointStore(tmp_path).save(2, refused)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, write_text)
    half = tmp_path / ".iter_2.writing"
    half.mkdir()
    (half / "weights").write_text("half")
    assert store.find().name == "iter_1"
    store.save(3, write_text)
    assert not half.exists()


def test_the_same_step_again_replaces_the_folder(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, write_text)
    store.save(1, lambda folder: (folder / checkpoint.STATE_FILE).write_text("new"))
    assert (tmp_path / "iter_1" / checkpoint.STATE_FILE).read_text() == "new"
    assert not (tmp_path / "iter_1" / "weights").exists()


def test_missing_checkpoint_lists_existing_ones(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.find()
    store.save(4, write_text)
    with pytest.raises(CheckpointError, match="iter_4"):
        store.find("iter_9")


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "AdamW8bit", "PagedAdamW32bit"])
def test_optimizer_state_comes_back_bit_for_bit(tmp_path, name):
    from xtuner.engine.optimizer.optim import load_optimizer, make_optimizer

    def trained(steps, optimizer=None, model=None):
        if model is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = torch.nn.Linear(80, 80)
            optimizer = make_optimizer(
                name, model, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, paged=False
            )
        for step in steps:
            model.zero_grad()
            inputs = torch.sin(torch.arange(80.0) * (step + 1))[None]
            (model(inputs) ** 2).sum().backward()
            optimizer.step()
        return model, optimizer

    straight, _ = trained(range(6))
    model, optimizer = trained(range(3))
    save_state(tmp_path, step=3, optimizer=optimizer.state_dict(), identity={"seed": 1, "lr": 0.5})
    _, fresh = trained([])
    fresh_model = torch.nn.Linear(80, 80)
    fresh_model.load_state_dict(model.state_dict())
    fresh = make_optimizer(
        name, fresh_model, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, paged=False
    )
    step, changed = load_state(
        tmp_path, load_optimizer=partial(load_optimizer, fresh), identity={"seed": 1, "lr": 0.25}
    )
    assert step == 3 and changed == ["lr: 0.5 then, 0.25 now"]
    resumed, _ = trained(range(3, 6), fresh, fresh_model)
    assert torch.equal(resumed.weight, straight.weight)


def test_a_damaged_state_is_a_clear_error(tmp_path):
    (tmp_path / checkpoint.STATE_FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="earlier checkpoint"):
        load_state(tmp_path, load_optimizer=lambda state: None, identity={})


def test_overwriting_deletes_checkpoints_and_failed_uploads_but_never_the_base_model(tmp_path):
    store = CheckpointStore(tmp_path, alias=True)
    store.save(5, write_text)
    store.mark_best("iter_5", "val_loss 1.0")
    (tmp_path / "upload_iter_5").mkdir()
    (tmp_path / "run.log").touch()
    for base in ("iter_5", "upload_iter_5"):
        with pytest.raises(CheckpointError, match="the model that this run starts from"):
            store.clear(keep=tmp_path / base)
    store.clear(keep=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run.log"]


@pytest.mark.parametrize("moment", ["between", "after"])
def test_the_same_step_saved_again_survives_a_kill_between_the_renames(
    tmp_path, monkeypatch, moment
):
    store = CheckpointStore(tmp_path)
    store.save(5, write_text)
    renames = []

    def killed(source, target, *, rename=os.rename):
        if len(renames) == (1 if moment == "between" else 2):
            raise KeyboardInterrupt
        renames.append(source)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        if moment == "after":  # both names exist: the new folder is complete, the old one remains
            patch.setattr(folder_swap.shutil, "rmtree", lambda *a, **k: None)
            store.save(5, write_text)
        else:
            with pytest.raises(KeyboardInterrupt):
                store.save(5, write_text)
    assert store.find().name == "iter_5"
    store.tidy()
    assert (store.find() / "weights").read_text() == "w"
    assert not list(tmp_path.glob(".*"))
