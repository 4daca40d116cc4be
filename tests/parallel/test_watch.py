"""A run that hangs ends and reports where; a slow one does not."""

import faulthandler
import json
import os
import time

import pytest
from torch.distributed import HashStore

from xtuner.parallel import activity, watch
from xtuner.parallel.activity import FIRST_STEP, Pace
from xtuner.parallel.watch import Watch, judge

LONG = 1000.0


def status(**values):
    found = {"doing": "step 3", "busy": None, "waits_for": None, "seconds": 0.0, "quiet": 50.0}
    return {**found, "expected": 1.0, "blocked": False, "at": "mine.py:7 in loss", **values}


WAITS = {"waits_for": "a sum", "seconds": 50.0}
BUSY = {"busy": "writing iter_2", "quiet": LONG}


@pytest.mark.parametrize(
    ("others", "silent", "late", "stuck", "patient"),
    [
        pytest.param([status()], 0, True, [1], [], id="works"),
        pytest.param([status(quiet=20.0)], 0, False, [1], [], id="progress"),
        pytest.param([status(quiet=20.0)], 40, True, [1], [], id="silent"),
        pytest.param([status(expected=8.0)], 0, False, [1], [], id="slow_steps"),
        pytest.param([status(quiet=90.0, expected=8.0)] * 2, 0, False, [1, 2], [], id="slower"),
        pytest.param([status(**WAITS)], 0, True, [], [], id="all_wait"),
        pytest.param([status(blocked=True), status()], 0, True, [2], [], id="in_a_layer"),
        pytest.param([status(**BUSY)], 0, False, [1], [1], id="busy"),
        pytest.param([status(**{**BUSY, **WAITS})], 0, False, [], [], id="busy_together"),
        pytest.param([status(busy=FIRST_STEP)], 0, False, [1], [1], id="first_step"),
        pytest.param([{}], 40, False, [1], [1], id="starts"),
    ],
)
def test_what_hangs(others, silent, late, stuck, patient):
    found = judge([status(**WAITS), *others], [0.0, *[float(silent)] * len(others)])
    assert (found.late, found.stuck, found.patient) == (late, stuck, patient)


@pytest.mark.parametrize(
    ("other", "ends"),
    [
        pytest.param(status(**BUSY), False, id="saves"),
        pytest.param(status(**{**BUSY, **WAITS}), True, id="waits_in_save"),
        pytest.param(status(busy=FIRST_STEP, quiet=LONG), False, id="first_step"),
        pytest.param(status(busy=FIRST_STEP, quiet=7000.0), True, id="endless_first_step"),
        pytest.param(status(quiet=LONG, expected=200.0), False, id="slow_steps"),
    ],
)
def test_what_is_waited_for_after_a_long_time(other, ends):
    found = judge([status(waits_for="a sum", quiet=LONG), other], [0.0, 0.0])
    assert (found.late and not found.patient) == ends


def test_a_process_that_saves_and_is_gone_is_not_waited_for():
    found = judge([status(waits_for="a sum", quiet=LONG), status(**BUSY)], [0.0, LONG])
    assert found.late and not found.patient and found.stuck == [1]


def test_a_number_replaces_what_was_measured():
    found = judge([status(**WAITS), status(expected=100.0)], [0.0, 0.0], timeout=49.0)
    assert found.late and found.limit == 49.0


def test_the_first_step_counts_only_for_the_second():
    pace = Pace()
    pace.begin(100)
    pace.record(60.0)
    pace.begin(100)
    assert pace.expected() == 60.0
    pace.steps = 1
    pace.record(2.0)
    assert pace.expected() == 60.0
    pace.steps = 2
    assert pace.expected() == 2.0
    pace.begin(400)  # four times as many tokens as before
    assert pace.expected() == 8.0
    pace.begin(400)
    assert pace.expected() == 2.0


def wait(monkeypatch, capfd, others, rank=0):
    """The output of a process while it waits, and its exit codes."""
    store, codes = HashStore(), []
    for other, found in others.items():
        store.set(f"watch/{other}", json.dumps(found))
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda file: None)
    current = activity.Activity(doing="step 3", busy=None)
    monkeypatch.setattr(activity, "current", current)
    watched = Watch(rank, 1 + len(others), timeout=0.2, connect=lambda: store)
    with activity.in_call("a sum"):
        end, said = time.monotonic() + 20, ""
        while "keep waiting" not in said and not codes:
            assert time.monotonic() < end
            said += capfd.readouterr().err
            time.sleep(0.05)
        said += capfd.readouterr().err
    watched.stop()
    return said, codes[0] if codes else None, store


def test_missing_process_is_reported_with_its_line(monkeypatch, capfd):
    said, code, store = wait(monkeypatch, capfd, {1: status(), 2: status(**WAITS)})
    assert code == watch.PEER_LOST and store.get("watch/end") == b"[1]"
    assert "process 0  step 3, waits in a sum for" in said and "in wait" in said
    assert "process 1  step 3, works, without progress for 50 s: mine.py:7 in loss" in said
    assert "The run hangs at process 1, so it ends." in said


def test_work_that_may_take_long_is_waited_for(monkeypatch, capfd):
    said, code, _ = wait(monkeypatch, capfd, {1: status(**BUSY)})
    assert code is None
    assert "is busy with writing iter_2: mine.py:7 in loss" in said
    assert "The others keep waiting for process 1." in said


def test_the_process_that_hangs_says_so_itself(monkeypatch, capfd):
    store = HashStore()
    store.set("watch/0", json.dumps(status(**WAITS)))
    store.set("watch/end", "[1]")
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda file: None)
    watched = Watch(1, 2, timeout=0.2, connect=lambda: store)
    end = time.monotonic() + 20
    while not codes:
        assert time.monotonic() < end
        time.sleep(0.05)
    watched.stop()
    assert codes[0] == watch.HUNG and "Process 1 made no progress." in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["busy", "in_call"])
def test_the_state_is_restored(kind, monkeypatch):
    monkeypatch.setattr(activity, "current", activity.Activity(busy=None))
    with getattr(activity, kind)("x"), activity.in_call("y"):
        found = activity.current.status()
    assert (found["busy"], found["waits_for"]) == (("x", "y") if kind == "busy" else (None, "x"))
    assert (activity.current.busy, activity.current.waits_for) == (None, None)


def test_a_first_step_is_told_from_later_ones(monkeypatch):
    monkeypatch.setattr(activity, "current", current := activity.Activity(busy="a hook"))
    with activity.in_step(1):
        assert current.status()["busy"] == FIRST_STEP
    current.pace.steps = 1
    with activity.in_step(2):
        assert (current.status()["busy"], current.status()["doing"]) == (None, "step 2")
    assert current.busy == "a hook"


def test_suspended_time_does_not_count(monkeypatch):
    monkeypatch.setattr(activity, "current", current := activity.Activity(busy=None))
    current.progressed -= LONG
    current.forgive(LONG)
    assert current.status()["quiet"] < LONG / 2
