"""`benchmarks/gpu_check.py`: the runner of its parts, and that its checks detect errors."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xtuner.testing.fake_cuda import device

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from gpucheck import correct, report, shapes
from gpucheck.bench import Bench
from gpucheck.plan import BY_NAME, PARTS, Part
from gpucheck.runner import Runner

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"
WORKER = """
import json, os, sys, time
def say(message): print(json.dumps(message), flush=True)
say({"end": "ready"})
for line in sys.stdin:
    name = line.strip()
    say({"row": {"name": name, "passed": name != "wrong", "found": os.getpid()}})
    if name == "crash": sys.exit("so it ended")
    if name == "hang": time.sleep(60)
    if name == "error": say({"error": "ValueError: no"})
    if name == "sticky": say({"error": "RuntimeError: CUDA error: an illegal memory access"})
    if name == "skip": say({"skipped": "no room"})
    say({"end": name})
"""


def part(name, **changes):
    values = {"function": "", "kind": "correctness", "seconds": 0.1, "limit": 20.0, **changes}
    return Part(name, **values)


def ran(tmp_path, *parts, seconds=60.0, worker=WORKER):
    lines = []
    runner = Runner(
        [sys.executable, "-c", worker],
        environment=dict(os.environ),
        log=tmp_path / "log",
        seconds=seconds,
        tell=lines.append,
    )
    found = list(runner.run(parts))
    assert len(lines) == len(found) == len(parts)
    return {outcome.part.name: outcome for outcome in found}


def test_a_part_that_crashes_hangs_or_fails_stops_no_other(tmp_path):
    names = ("good", "crash", "next", "error", "same", "sticky", "fresh")
    found = ran(tmp_path, *map(part, names), part("hang", limit=0.5), part("last"))
    states = {name: outcome.state for name, outcome in found.items()}
    assert states == {
        **dict.fromkeys(("good", "next", "same", "fresh", "last"), "done"),
        **dict.fromkeys(("crash", "error", "sticky", "hang"), "failed"),
    }
    assert "so it ended" in found["crash"].reason and "stopped" in found["hang"].reason
    assert all(len(outcome.rows) == 1 for outcome in found.values())  # also of those that failed
    process = {name: outcome.rows[0]["found"] for name, outcome in found.items()}
    assert process["good"] == process["crash"] != process["next"]
    assert process["next"] == process["same"] == process["sticky"] != process["fresh"]
    assert process["hang"] == process["fresh"] != process["last"]


def test_parts_without_time_are_reported_and_skipped(tmp_path):
    found = ran(tmp_path, part("good"), part("long", seconds=500.0), part("last"), seconds=30)
    assert [outcome.state for outcome in found.values()] == ["done", "not reached", "done"]
    assert "needs about 500 s" in found["long"].reason and not found["long"].passed


def test_worker_start_is_tried_twice(tmp_path):
    code = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit('no GPU here')"
    found = ran(tmp_path, part("one"), part("two"), part("three"), worker=code)
    assert not any(outcome.passed for outcome in found.values())
    assert "no GPU here" in found["one"].reason and "no worker" in found["three"].reason
    assert (tmp_path / "starts").read_text() == "xx"


def test_only_what_had_to_be_right_fails_the_check(tmp_path):
    found = ran(tmp_path, part("wrong"), part("skip"), part("error", kind="speed"), part("crash"))
    passed = {name: outcome.passed for name, outcome in found.items()}
    assert passed == {"wrong": False, "skip": True, "error": True, "crash": False}
    files = {"json_path": tmp_path / "a.json", "markdown": tmp_path / "a.md"}
    text = report.write(list(found.values()), about={"machine": "x|y"}, **files)
    assert "| wrong | wrong |" in text and "**FAILED**" in text and "no room" in text
    kept = json.loads(files["json_path"].read_text())
    assert kept["passed"] is False and len(kept["parts"]) == 4


def test_every_part_has_a_function():
    import importlib

    for piece in PARTS:
        module, _, name = piece.function.partition(":")
        assert callable(getattr(importlib.import_module(f"gpucheck.{module}"), name))
        assert piece.seconds < piece.limit
    assert len(BY_NAME) == len(PARTS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    return Bench.of(argparse.Namespace(tiny=True, fake=False, work=folder))


def failed(rows):
    return {row.name for row in rows if row.passed is False}


def test_gradients_pass_and_an_adapter_that_is_too_strong_does_not(bench, monkeypatch):
    folder = shapes.small_model(bench.folder, "heads of 64", tiny=True)
    changes = correct.TUNINGS["LoRA"]
    assert not failed(correct._compared("LoRA", bench, folder, changes))
    right = correct.on_card

    def stronger(*arguments):
        model = right(*arguments)
        for module in model.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                module.scaling = {name: 1.1 * value for name, value in scaling.items()}
        return model

    monkeypatch.setattr(correct, "on_card", stronger)
    assert "LoRA: gradients" in failed(correct._compared("LoRA", bench, folder, changes))


def test_a_window_that_is_one_too_wide_is_seen(bench, monkeypatch):
    right = shapes.small_model(bench.folder, "windows of 48", tiny=True)
    kind, heads = shapes.HEADS["windows of 48"]
    monkeypatch.setitem(shapes.HEADS, "wider", (kind, {**heads, "sliding_window": 49}))
    wider = shapes.small_model(bench.folder, "wider", tiny=True)
    wanted = correct.plain_gradients
    monkeypatch.setattr(correct, "plain_gradients", lambda folder, *rest: wanted(right, *rest))
    for folder, wrong in ((right, False), (wider, True)):
        found = failed(correct._compared("full", bench, folder, correct.TUNINGS["all weights"]))
        assert bool(found) == wrong, found


def test_isolation_passes_and_a_leak_does_not(bench, monkeypatch):
    folder = shapes.small_model(bench.folder, "heads of 64", tiny=True)
    arguments = ("LoRA", bench, folder, correct.TUNINGS["LoRA"])
    assert not failed(correct._isolated(*arguments))
    right = correct._states

    def leaking(model, batch, bench):
        states = right(model, batch, bench)
        return states + 1e-5 * states.mean(1, keepdim=True)

    monkeypatch.setattr(correct, "_states", leaking)
    assert "LoRA: another first sample changes the others by" in failed(
        correct._isolated(*arguments)
    )


def test_wrong_dequantised_values_are_detected(bench, monkeypatch):
    assert not failed(correct.dequantise(bench))
    from xtuner.kernels import four_bit

    right = four_bit.dequantized
    monkeypatch.setattr(four_bit, "dequantized", lambda *arguments: right(*arguments) * (1 + 2**-7))
    assert len(failed(correct.dequantise(bench))) == 12


def check(tmp_path, *options, timeout=200):
    command = [sys.executable, str(SCRIPT), "--tiny", *options]
    command += ["--json", "out.json", "--markdown", "out.md"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=timeout
    )
    found = json.loads((tmp_path / "out.json").read_text())
    return done, {one["name"]: one for one in found["parts"]}


def test_it_runs_from_the_command_line(tmp_path):
    done, parts = check(tmp_path, "--only", "dequantise")
    assert done.returncode == 0, done.stdout + done.stderr
    assert parts["dequantise"]["state"] == "done"
    assert (
        "| dequantise | nf4, double, bfloat16: values not equal | 0 | 0 | passed |"
        in (tmp_path / "out.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(device.find_compiler() is None, reason="it has to be compiled")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real ones")
def test_all_of_it_on_a_fake_cuda_device(tmp_path):
    began = time.monotonic()
    done, parts = check(tmp_path, "--fake", "--seconds", "1000", timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    skipped = {name for name, one in parts.items() if one["state"] != "done"}
    assert skipped <= {name for name in parts if name.startswith("peer")} | {"chat_7b_compiled"}
    assert set(parts) == set(BY_NAME), time.monotonic() - began
