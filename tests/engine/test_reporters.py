"""Scalars at experiment trackers, and numbers that hooks add."""

import io
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xtuner.config.combinations import TRACKERS
from xtuner.config.load import load_settings
from xtuner.engine.hook_calls import HookCalls
from xtuner.engine.hooks.base import BaseHook, Run, make_hooks
from xtuner.errors import ConfigError
from xtuner.hub.sharing import shareable
from xtuner.parallel.processes import Processes

NEEDED = {"pretrained_model_name_or_path": "m", "data_path": "d.jsonl", "tensorboard": False}
PACKAGES = [name for name in TRACKERS if name != "tensorboard"]


class Tracker(types.ModuleType):
    """Records every call of any function."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, function):
        if function.startswith("__"):
            raise AttributeError(function)
        return lambda *args, **kwargs: self.calls.append((function, args, kwargs))


def run_of(tmp_path, **given):
    settings = load_settings({**NEEDED, **given}).settings
    (log := tmp_path / "work" / "log").mkdir(parents=True)
    console = Console(file=io.StringIO(), width=200)
    return Run(settings, tmp_path / "work", log, console, str, None, total_steps=2)


def steps(hooks, run):
    calls = HookCalls(hooks, run, Processes(torch.device("cpu")))
    try:
        calls.call("on_start")
        for step in (1, 2):
            run.step, run.scalars = step, {"loss": 1.0 / step, "lr": 1e-3}
            calls.call("on_step")
        run.scalars["val_loss"] = 0.25
        calls.call("on_end")
    finally:
        for hook in calls.hooks:
            calls.close(hook)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_tracker_gets_the_run_its_numbers_and_its_end(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, tracker := Tracker(package))
    run = run_of(tmp_path, report_to=package, report_project="shop")
    steps(make_hooks(run, custom=(), folder=tmp_path), run)
    sent = [(args, kwargs) for name, args, kwargs in tracker.calls if name.startswith("log")
            and name != "log_params"]  # fmt: skip
    numbers = [{k.split("/")[-1]: v for k, v in args[0].items()} for args, _ in sent]
    assert [kwargs["step"] for _, kwargs in sent] == [1, 2, 2]
    assert numbers == [{"loss": 1.0, "lr": 1e-3}, {"loss": 0.5, "lr": 1e-3}, {"val_loss": 0.25}]
    assert "shop" in str(tracker.calls[0]) and tracker.calls[-1][0] in ("finish", "end_run")


def test_failing_tracker_is_disabled_and_does_not_end_the_run(tmp_path, monkeypatch):
    tracker = Tracker("wandb")
    tracker.log = lambda *args, **kwargs: tracker.calls.append("log") or 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    run = run_of(tmp_path, report_to="wandb")
    steps(make_hooks(run, custom=(), folder=tmp_path), run)
    assert tracker.calls.count("log") == 1 and tracker.calls[-1][0] == "finish"
    assert "wandb could not log" in run.console.file.getvalue()


def test_tracker_that_cannot_be_opened_is_left_alone(tmp_path, monkeypatch):
    tracker = Tracker("swanlab")
    tracker.init = lambda **options: {}["no account."]
    monkeypatch.setitem(sys.modules, "swanlab", tracker)
    run = run_of(tmp_path, report_to="swanlab")
    steps(make_hooks(run, custom=(), folder=tmp_path), run)
    assert not tracker.calls
    told = run.console.file.getvalue()
    assert "swanlab could not open the run" in told and "no account.'. They are in" in told


def test_a_run_that_mlflow_opened_in_part_is_closed(tmp_path, monkeypatch):
    tracker = Tracker("mlflow")
    tracker.log_params = lambda values: {}["too long"]
    monkeypatch.setitem(sys.modules, "mlflow", tracker)
    run = run_of(tmp_path, report_to="mlflow")
    steps(make_hooks(run, custom=(), folder=tmp_path), run)
    assert [name for name, *_ in tracker.calls] == ["set_experiment", "start_run", "end_run"]


def test_tracker_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    run = run_of(tmp_path, report_to="swanlab")
    with pytest.raises(ConfigError, match=r"pip install 'xtuner\[swanlab\]'"):
        steps(make_hooks(run, custom=(), folder=tmp_path), run)
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        load_settings({**NEEDED, "report_to": "wanb"})


@pytest.mark.parametrize("order", [0, 50, 99])
def test_numbers_of_a_hook_reach_the_log_whatever_its_order(tmp_path, order):
    class Adds(BaseHook):
        def on_step(self, run):
            run.scalars["mine"] = 7.0

    Adds.order = order
    run = run_of(tmp_path)
    steps([*make_hooks(run, custom=(), folder=tmp_path), Adds()], run)
    lines = (run.log_dir / "scalars.jsonl").read_text().splitlines()
    assert all('"mine": 7.0' in line for line in lines[:2])


def test_nothing_of_the_home_directory_or_a_token_is_shared():
    home = Path.home()
    token = "hf_" + "a" * 30
    given = {"path": f"{home}/data/x.jsonl", "list": [f"{home}", "other"], "note": f"use {token}"}
    assert shareable(given) == {
        "path": "~/data/x.jsonl", "list": ["~", "other"], "note": "use <token>",
    }  # fmt: skip
    for text in (f"/gpfs{home}/w", f"~{home}", f"x{home}/w", f"{home}er"):
        assert shareable(text) == text
    assert shareable(f"file://{home}/w, '{home}/x y'") == "file://~/w, '~/x y'"
    given = {"api_key": "abc", "max_new_tokens": 9, "at": "https://me:pass@host/x", "token": None}
    assert shareable(given) == {
        "api_key": "<token>", "max_new_tokens": 9, "at": "https://<token>@host/x", "token": None,
    }  # fmt: skip
