"""The best checkpoint, early stopping, and checkpoints at the end of epochs."""

from types import SimpleNamespace

import pytest
import torch
from data_makers import chats, write_jsonl

from xtuner.config.load import load_settings
from xtuner.convert.to_hf import find_checkpoint
from xtuner.engine.best import BestMetric
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.hooks.base import Run
from xtuner.errors import ConfigError
from xtuner.parallel.processes import Processes
from xtuner.testing.tiny import tiny_model_folder
from xtuner.training import preflight
from xtuner.training.run import train

NEEDED = {"pretrained_model_name_or_path": "m", "data_path": "d.jsonl"}


def settings(**given):
    return load_settings({**NEEDED, "validation_ratio": 0.1, **given}).settings


def measured(best, *values):
    run = Run(best._s, None, None, None, None, None, 99)
    found = []
    for value in values:
        run.step += 1
        run.scalars = {} if value is None else {best._s.best_metric: value}
        found.append(best.improves(run))
    return found


@pytest.fixture
def alone():
    return Processes(torch.device("cpu"))


def test_lower_or_higher_is_better_and_steps_without_a_value_do_not_count(tmp_path, alone):
    best = BestMetric(settings(early_stopping_patience=2), CheckpointStore(tmp_path), alone)
    assert measured(best, 3.0, None, 2.0, 2.0) == [True, False, True, False]
    assert not best.exhausted and best.waited == 1
    best = BestMetric(
        settings(keep_best=True, best_metric="score", best_metric_goal="max"),
        CheckpointStore(tmp_path),
        alone,
    )
    assert measured(best, 1.0, float("nan"), 0.5, 2.0) == [True, False, False, True]
    assert not best.exhausted


def test_best_checkpoint_is_not_pruned_and_its_value_is_resumed(tmp_path, alone):
    store = CheckpointStore(tmp_path, limit=1)
    for step in (1, 2, 3):
        store.save(step, lambda folder: (folder / "config.json").write_text("{}"))
        if step == 1:
            store.mark_best("iter_1", "val_loss 1.5")
    assert [path.name for path in store.all()] == ["iter_1", "iter_3"]
    assert find_checkpoint(tmp_path / "best_checkpoint") == store.best() == tmp_path / "iter_1"


def test_an_old_checkpoint_has_its_best_value_in_the_file(tmp_path, alone):
    store = CheckpointStore(tmp_path)
    store.mark_best("iter_1", "val_loss 1.5")
    best = BestMetric(settings(keep_best=True), store, alone)
    best.load_state_dict({}, source=tmp_path / "iter_3")
    assert best.value == 1.5 and measured(best, 2.0, 1.0) == [False, True]


@pytest.mark.parametrize("keep_best", [True, False], ids=["kept", "not-kept"])
def test_the_state_of_a_run_continues(tmp_path, alone, keep_best):
    store = CheckpointStore(tmp_path)
    given = settings(keep_best=keep_best, early_stopping_patience=3)
    best = BestMetric(given, store, alone)
    assert measured(best, 2.0, 1.0, 3.0, 3.0) == [True, True, False, False]
    for step in (2, 4):
        store.save(step, lambda folder: (folder / "config.json").write_text("{}"))
    again = BestMetric(given, store, alone)
    again.load_state_dict(best.state_dict(), source=tmp_path / "iter_4")
    assert again.state_dict() == best.state_dict()
    # a run killed between the best checkpoint and the file that names it
    assert store.best() == (tmp_path / "iter_2" if keep_best else None)
    assert measured(again, 1.0) == [False] and again.exhausted
    other = BestMetric(settings(keep_best=True, best_metric="score"), store, alone)
    other.load_state_dict(best.state_dict(), source=tmp_path / "iter_4")
    assert other.value is None and other.waited == 0


def test_the_last_measurement_is_later_than_the_last_checkpoint(tmp_path, alone):
    store = CheckpointStore(tmp_path)
    best = BestMetric(settings(keep_best=True), store, alone)
    measured(best, 2.0, 2.5)
    store.save(3, lambda folder: (folder / "config.json").write_text("{}"))
    store.mark_best("iter_3", "val_loss 1.0")
    best.load_state_dict(best.state_dict(), source=tmp_path / "iter_3")
    assert (best.value, best.waited) == (1.0, 0) and store.best() == tmp_path / "iter_3"


def test_other_processes_take_the_entry_of_the_main_process(tmp_path):
    store = CheckpointStore(tmp_path)
    store.mark_best("iter_2", "val_loss 2.0")  # rewritten by the main process in the meantime
    other = SimpleNamespace(is_main=False, gather=lambda own: [*own, ("iter_3", "val_loss", 1.0)])
    best = BestMetric(settings(keep_best=True), store, other)
    state = {"metric": "val_loss", "goal": "min", "value": 2.0, "name": "iter_2", "waited": 1}
    best.load_state_dict(state, source=tmp_path / "iter_3")
    assert (best.value, best.waited) == (1.0, 0)


@pytest.mark.parametrize("value", [2.0, None], ids=["pruned", "not-yet-measured"])
def test_the_best_of_an_abandoned_branch_is_not_the_best_of_the_resumed_run(tmp_path, alone, value):
    store = CheckpointStore(tmp_path)
    for step in (2, 4):
        store.save(step, lambda folder: (folder / "config.json").write_text("{}"))
    store.mark_best("iter_4", "val_loss 1.0")
    best = BestMetric(settings(keep_best=True), store, alone)
    name = "iter_1" if value else ""  # which is deleted
    state = {"metric": "val_loss", "goal": "min", "value": value, "name": name, "waited": 1}
    best.load_state_dict(state, source=tmp_path / "iter_2")
    assert best.value == value and store.best_entry()[0] == ""
    store.save(5, lambda folder: (folder / "config.json").write_text("{}"))
    assert store.best() is None


def test_the_words_for_one_measurement(tmp_path, alone):
    best = BestMetric(settings(early_stopping_patience=1), CheckpointStore(tmp_path), alone)
    measured(best, 1.0, 2.0)
    assert best.reason() == "val_loss was best at 1 and has not improved in the last measurement"


def test_values_that_are_no_numbers_end_the_run(tmp_path, alone):
    best = BestMetric(settings(early_stopping_patience=2), CheckpointStore(tmp_path), alone)
    assert measured(best, float("nan"), float("nan")) == [False, False]
    assert best.exhausted and best.reason() == "val_loss was not a number in 2 measurements"


def test_a_metric_that_nothing_measures_is_noted_once(tmp_path, alone):
    best = BestMetric(
        settings(keep_best=True, best_metric="acuracy"), CheckpointStore(tmp_path), alone
    )
    run = Run(best._s, None, None, None, None, None, 99)
    run.step, run.scalars = 2, {"loss": 1.0, "accuracy": 0.5}
    assert not best.improves(run)
    assert best.never_measured(run) == (
        "best_metric = 'acuracy' has not been measured by step 2, so no checkpoint is the best "
        "one. Measured: loss, accuracy."
    )
    assert best.never_measured(run) is None
    found = BestMetric(
        settings(keep_best=True, best_metric="accuracy"), CheckpointStore(tmp_path), alone
    )
    assert found.improves(run) and found.never_measured(run) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_best": True}, "keep_best .*needs a validation loss"),
        ({"early_stopping_patience": 3}, "early_stopping_patience .*needs a validation loss"),
        ({"validation_path": "v.jsonl", "validation_ratio": 0.1}, "validation_ratio must be 0"),
    ],
)
def test_incomparable_values_are_rejected(given, words):
    with pytest.raises(ConfigError, match=words):
        load_settings({**NEEDED, **given})


SCORES = """
from xtuner.engine.hooks.base import BaseHook

class Scores(BaseHook):
    def on_step(self, run):
        run.scalars["score"] = [0.1, 0.2, 0.9, 0.5, 0.4, 0.6, 0.7, 0.3, 0.2, 0.1][run.step - 1]

class Dies(BaseHook):
    order = 99

    def on_step(self, run):
        if run.step == 6:
            raise RuntimeError("died on purpose")
"""


@pytest.mark.parametrize("keep_best", [True, False], ids=["kept", "not-kept"])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(
    tmp_path, capsys, monkeypatch, keep_best
):
    model = tiny_model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "d.jsonl", chats(4))
    hooks = tmp_path / "hooks.py"
    hooks.write_text(SCORES)

    uploaded = []
    monkeypatch.setattr(preflight, "check_target", lambda repo: None)
    monkeypatch.setattr(
        "xtuner.training.run.publish", lambda folder, repo, **given: uploaded.append(folder.name)
    )

    def run(work_dir, *names, resume=None):
        loaded = load_settings(
            {
                "pretrained_model_name_or_path": str(model), "data_path": str(data), "lora_r": 2,
                "max_length": 128, "pack_to_max_length": False, "accumulative_counts": 4,
                "max_epochs": 10, "dtype": "float32", "save_steps": 5, "keep_best": keep_best,
                "early_stopping_patience": 4, "best_metric": "score", "best_metric_goal": "max",
                "push_to_hub": "me/mine", "custom_hooks": [f"{hooks}:{name}" for name in names],
            },
            overrides={"work_dir": str(work_dir)},
        )  # fmt: skip
        return train(loaded, resume=resume)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run(straight, "Scores").step == 7
    with pytest.raises(RuntimeError, match="died on purpose"):
        run(broken, "Scores", "Dies")
    assert run(broken, "Scores", resume="last").step == 7
    told = capsys.readouterr().out
    early = "score was best at 0.9 and has not improved in the last 4 measurements"
    assert told.count(f"Stopped early at step 7: {early}.") == 2
    assert contents(broken) == contents(straight)
    best = f"Best by score: {broken}/iter_3\nTalk to it:  xtuner chat {broken}/best_checkpoint\n"
    assert (best in told) == keep_best
    assert uploaded == (["iter_3"] * 2 if keep_best else ["iter_7"] * 2)
    if not keep_best:
        return
    assert run(broken, "Scores", resume="last").step == 7
    assert f"iter_7 ended early at step 7: {early}. To continue, raise" in capsys.readouterr().out


def contents(work_dir):
    """The checkpoints with their weights, and the file that names the best."""
    store = CheckpointStore(work_dir)
    weights = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in store.all()}
    return weights, store.best_entry()[:2]


def test_a_run_stops_early_and_keeps_its_best(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "d.jsonl", chats(8))
    held_out = write_jsonl(tmp_path / "v.jsonl", chats(2))
    loaded = load_settings(
        {
            "pretrained_model_name_or_path": str(model), "data_path": str(data),
            "validation_path": str(held_out), "tuning": "full", "lr": 3.0, "max_norm": 1.0,
            "optim_type": "SGD", "warmup_ratio": 0.0, "lr_schedule": "constant",
            "max_length": 256, "pack_to_max_length": False, "accumulative_counts": 4,
            "max_epochs": 10, "evaluation_freq": 1, "save_epochs": 1, "keep_best": True,
            "early_stopping_patience": 2, "save_total_limit": -1, "dtype": "float32",
        },
        overrides={"work_dir": str(tmp_path / "run")},
    )  # fmt: skip
    result = train(loaded)
    told = capsys.readouterr().out
    assert "v.jsonl (validation): 2 rows" in told.replace("\n", "")
    assert "Stopped early at step" in told and result.step < 20
    store = CheckpointStore(tmp_path / "run")
    names = [path.name for path in store.all()]
    assert "iter_2" in names  # the end of the first epoch
    assert f"iter_{result.step}" in names and store.best() is not None
