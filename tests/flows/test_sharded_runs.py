"""Complete runs of two processes with sharded weights: they end like a run of one process, and
resume from each other's checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from sharded_runs import answers, end_of, runs, scalars
from test_resume import ROWS, SETTINGS

from xtuner.parallel.processes import Processes
from xtuner.testing.run_distributed import run_distributed

pytestmark = pytest.mark.distributed
STOPS = """
import os, signal
from xtuner.engine.hooks.base import BaseHook

class Stop(BaseHook):
    order = 99

    def on_step(self, run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
"""
BROKEN = """
import torch
from xtuner.algorithms.sft import Algorithm

class Broken(Algorithm):
    def loss(self, model, batch):
        output = super().loss(model, batch)
        bad = torch.nan if any(row.line == 7 for row in batch.rows) else 1.0
        return type(output)(output.loss * bad)
"""
ALL = ("fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
OFFLOADED = ("deepspeed_zero2_offload", "deepspeed_zero3_offload")
FEW = ("fsdp2",)
BROKEN_RUN = ("algorithm=parts.py:Broken", "shuffle=False")
STEPS = 4


def last_checkpoint(work_dir):
    file = Path(work_dir) / "last_checkpoint"
    return file.read_text() if file.exists() else None


def prepare(folder, model, tuning):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "parts.py").write_text(STOPS + BROKEN, encoding="utf-8")
    text = SETTINGS.format(model=str(model), tuning=tuning, hook="", dies=False)
    text += (
        f"lora_dropout = 0.0\nmax_steps = {STEPS}\nsave_steps = 2\nsave_total_limit = -1\n"
        "lr_schedule = 'constant'\nevaluation_freq = 2\n"
    )
    lines = [line for line in text.splitlines() if line != "lora_dropout = 0.1"]
    names = [line.split(" = ")[0] for line in lines]
    last = {name: line for name, line in zip(names, lines, strict=True) if name}
    (folder / f"{tuning}.py").write_text("\n".join(last.values()), encoding="utf-8")


def cases_of(strategies, tuning):
    """For each strategy: a run, one that resumes another one's checkpoint, one that is stopped,
    and one with a bad row."""
    cases = []
    for strategy, before in zip(strategies, ("deepspeed_zero3", *strategies), strict=False):
        chosen = [f"strategy={strategy}", "accumulative_counts=1"]
        first = [f"strategy={before}", "accumulative_counts=1", "max_steps=2"]
        stop = "custom_hooks=['parts.py:Stop']"
        file, work = f"{tuning}.py", f"{tuning}_{strategy}"
        cases += [
            (file, work, chosen),
            (file, f"{work}_on", first),
            (file, f"{work}_on", [*chosen, "gradient_checkpointing=True"], "last"),
            (file, f"{work}_stopped", [*chosen, stop]),
            (file, f"{work}_stopped", chosen, "last"),
            (file, f"{work}_broken", [*chosen, *BROKEN_RUN]),
        ]
    return cases


def assert_as_alone(folder, strategies, tuning, ends):
    """Compare with a run of one process on the same groups of packs."""
    file, alone = f"{tuning}.py", Processes("cpu")
    assert end_of(alone, folder, file, f"{tuning}_alone") == STEPS
    expected = scalars(folder / f"{tuning}_alone")
    told = end_of(alone, folder, file, f"{tuning}_broken", BROKEN_RUN)
    assert "rows.jsonl line 7" in told and "the loss of these rows is" in told
    broken_at = last_checkpoint(folder / f"{tuning}_broken")
    for strategy, (straight, first, on, stopped, again, broken) in zip(
        strategies, zip(*[iter(ends)] * 6, strict=True), strict=True
    ):
        work = folder / f"{tuning}_{strategy}"
        assert (straight, first, on, again) == (STEPS, 2, STEPS, STEPS), strategy
        assert stopped == "Interrupted: Stopped at step 3; it is saved."
        assert broken == told
        assert last_checkpoint(f"{work}_broken") == broken_at
        for name, tolerance in (("", 1e-5), ("_on", 1e-4), ("_stopped", 1e-5)):
            found = scalars(f"{work}{name}")
            assert found.keys() == expected.keys()
            for step, values in expected.items():
                assert found[step]["loss"] == pytest.approx(values["loss"], abs=tolerance)
        assert answers(work) == answers(folder / f"{tuning}_alone")
        straight_losses = [values["loss"] for values in scalars(work).values()]
        assert straight_losses == [v["loss"] for v in scalars(f"{work}_stopped").values()]
    # on one process from a checkpoint of two
    last = folder / f"{tuning}_{strategies[-1]}"
    for later in ("iter_4", "last_checkpoint"):
        path = last / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert end_of(Processes("cpu"), folder, file, last.name, (), "iter_2") == STEPS
    for step, values in scalars(last).items():
        assert values["loss"] == pytest.approx(expected[step]["loss"], abs=1e-4)


def test_runs_end_as_alone_and_go_on_from_each_other(tmp_path, tiny_model_path):
    prepare(tmp_path, tiny_model_path, "lora")
    first, second = run_distributed(runs, tmp_path, cases_of(FEW, "lora"))
    assert first == second
    assert_as_alone(tmp_path, FEW, "lora", first)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_strategy_ends_as_alone(tuning, tmp_path, tiny_model_path):
    prepare(tmp_path, tiny_model_path, tuning)
    first, second = run_distributed(runs, tmp_path, cases_of(ALL, tuning), timeout=280)
    assert first == second
    assert_as_alone(tmp_path, ALL, tuning, first)


@pytest.mark.slow
def test_offloaded_strategies_end_as_alone(tmp_path, tiny_model_path):
    prepare(tmp_path, tiny_model_path, "lora")
    first, second = run_distributed(runs, tmp_path, cases_of(OFFLOADED, "lora"), timeout=280)
    assert first == second
    assert_as_alone(tmp_path, OFFLOADED, "lora", first)


@pytest.mark.slow
def test_a_run_goes_on_with_another_sequence_size(tmp_path, tiny_model_path):
    prepare(tmp_path, tiny_model_path, "full")
    split, apart = (
        ["sequence_parallel_size=2", "accumulative_counts=2"],
        ["sequence_parallel_size=1", "accumulative_counts=1"],
    )
    cases = []
    for strategy in ("replicated", "fsdp2"):
        for name, before, after in (("to_2", apart, split), ("to_1", split, apart)):
            work, chosen = f"{strategy}_{name}", f"strategy={strategy}"
            cases.append(("full.py", work, [chosen, *before, "max_steps=2"]))
            cases.append(("full.py", work, [chosen, *after], "last"))
    first, second = run_distributed(runs, tmp_path, cases, timeout=280)
    assert first == second == [2, STEPS] * 4
    assert end_of(Processes("cpu"), tmp_path, "full.py", "alone") == STEPS
    expected = scalars(tmp_path / "alone")
    for _, work, *_ in cases:
        for step, values in scalars(tmp_path / work).items():
            assert values["loss"] == pytest.approx(expected[step]["loss"], abs=1e-4), (work, step)
