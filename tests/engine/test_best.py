"""The best checkpoint, early stopping, and checkpoints at the end of epochs."""

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
    best = BestMetric(settings(early_stopping_patience=2), tmp_path, alone)
    assert measured(best, 3.0, None, 2.0, 2.0) == [True, False, True, False]
    assert not best.exhausted and best.waited == 1
    best = BestMetric(
        settings(keep_best=True, best_metric="score", best_metric_goal="max"), tmp_path, alone
    )
    assert measured(best, 1.0, float("nan"), 0.5, 2.0) == [True, False, False, True]
    assert not best.exhausted


def test_best_checkpoint_is_not_pruned_and_its_value_is_resumed(tmp_path, alone):
    store = CheckpointStore(tmp_path, limit=1)
    for step in (1, 2, 3):
        store.save(step, lambda folder: (folder / "config.json").write_text("{}"))
        if step == 1:
            store.mark_best(1, "val_loss 1.5")
    assert [path.name for path in store.all()] == ["iter_1", "iter_3"]
    assert find_checkpoint(tmp_path / "best_checkpoint") == store.best() == tmp_path / "iter_1"
    best = BestMetric(settings(keep_best=True), tmp_path, alone)
    best.resume()
    assert best.value == 1.5 and measured(best, 2.0, 1.0) == [False, True]


def test_a_metric_that_nothing_measures_is_noted_once(tmp_path, alone):
    best = BestMetric(settings(keep_best=True, best_metric="acuracy"), tmp_path, alone)
    run = Run(best._s, None, None, None, None, None, 99)
    run.step, run.scalars = 2, {"loss": 1.0, "accuracy": 0.5}
    assert not best.improves(run)
    assert best.never_measured(run) == (
        "best_metric = 'acuracy' has not been measured by step 2, so no checkpoint is the best "
        "one. Measured: loss, accuracy."
    )
    assert best.never_measured(run) is None
    found = BestMetric(settings(keep_best=True, best_metric="accuracy"), tmp_path, alone)
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


def test_the_best_checkpoint_by_a_metric_of_a_users_hook(tmp_path):
    (tmp_path / "score.py").write_text(
        "from xtuner.engine.hooks.base import BaseHook\n\n"
        "class Score(BaseHook):\n"
        "    def on_step(self, run):\n"
        "        run.scalars['score'] = -abs(run.step - 2)\n"
    )
    data = write_jsonl(tmp_path / "d.jsonl", chats(4))
    loaded = load_settings(
        {
            "pretrained_model_name_or_path": str(tiny_model_folder(tmp_path / "model")),
            "data_path": str(data), "tuning": "lora", "lora_r": 2, "max_steps": 4,
            "max_length": 256, "pack_to_max_length": False, "accumulative_counts": 1,
            "custom_hooks": [f"{tmp_path / 'score.py'}:Score"], "keep_best": True,
            "best_metric": "score", "best_metric_goal": "max", "save_steps": 1,
            "save_total_limit": 1, "dtype": "float32",
        },
        overrides={"work_dir": str(tmp_path / "run")},
    )  # fmt: skip
    train(loaded)
    store = CheckpointStore(tmp_path / "run")
    assert [path.name for path in store.all()] == ["iter_2", "iter_4"]
    assert find_checkpoint(tmp_path / "run" / "best_checkpoint") == tmp_path / "run" / "iter_2"


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
