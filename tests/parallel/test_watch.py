"""A process that waits too long reports where every process is, and ends or keeps waiting."""

import json
import os
import time

import pytest
from torch.distributed import HashStore

from xtuner.parallel import activity, watch
from xtuner.parallel.watch import Watch


def other(**status):
    found = {"time": time.time(), "doing": "step 3", "busy": None, "waits_for": None}
    return {**found, "seconds": 0.0, "at": "mine.py:7 in loss", **status}


def wait(monkeypatch, capfd, others):
    """What process 0 says while it waits, and its exit codes."""
    store, codes = HashStore(), []
    for rank, status in enumerate(others, start=1):
        store.set(f"watch/{rank}", json.dumps(status))
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(activity, "current", activity.Activity(doing="step 3", busy=None))
    watched = Watch(0, 1 + len(others), limit=0.2, connect=lambda: store)
    with activity.in_call("a sum"):
        end = time.monotonic() + 20
        while "It keeps waiting" not in (said := capfd.readouterr().err) and not codes:
            assert time.monotonic() < end
            time.sleep(0.05)
        said += capfd.readouterr().err
    watched.stop()
    return said, codes


def test_missing_process_is_reported_with_its_line(monkeypatch, capfd):
    silent = other(time=time.time() - 100, at="far.py:1 in x")
    said, codes = wait(monkeypatch, capfd, [other(), silent])
    assert codes == [watch.HUNG]
    assert "process 0  step 3, waits in a sum for" in said and "in wait" in said
    assert "process 1  step 3, works: mine.py:7 in loss" in said
    assert "process 2  step 3, no sign of life for 100 s" in said


def test_work_that_may_take_long_is_waited_for(monkeypatch, capfd):
    said, codes = wait(monkeypatch, capfd, [other(busy="writing iter_2")])
    assert codes == []
    assert "is busy with writing iter_2: mine.py:7 in loss" in said
    assert "It keeps waiting for process 1." in said


@pytest.mark.parametrize("kind", ["busy", "in_call"])
def test_the_state_is_restored(kind, monkeypatch):
    monkeypatch.setattr(activity, "current", activity.Activity(busy=None))
    with getattr(activity, kind)("x"), activity.in_call("y"):
        status = activity.current.status()
    assert (status["busy"], status["waits_for"]) == (("x", "y") if kind == "busy" else (None, "x"))
    assert (activity.current.busy, activity.current.waits_for) == (None, None)
