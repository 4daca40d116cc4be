"""Runs are separate processes, one at a time."""

import subprocess
import sys

import pytest

from xtuner.engine import run_lock
from xtuner.errors import ConfigError, LaunchError
from xtuner.web import jobs as module
from xtuner.web.folders import Folders
from xtuner.web.jobs import Jobs

HOLD = """
import signal, sys, time
from pathlib import Path
from xtuner.engine import run_lock
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folders(tmp_path):
    return Folders.of(tmp_path / "runs", [tmp_path])


@pytest.fixture
def commands(monkeypatch):
    """Records the commands to start, and starts a waiting process instead."""
    started = []

    class Waiting(subprocess.Popen):
        def __init__(self, words, **options):
            started.append((words, options))
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(module.subprocess, "Popen", Waiting)
    yield started


def test_a_run_is_a_process_that_outlives_the_page(folders, commands):
    jobs = Jobs(folders)
    jobs.start("first", "lr = 1e-4\n")
    ((words, options),) = commands
    work_dir = folders.runs / "first"
    assert words[1:] == ["-m", "xtuner.cli.app", "train", str(work_dir / "settings.py"),
                         "--work-dir", str(work_dir)]  # fmt: skip
    assert options["start_new_session"] and (work_dir / "settings.py").read_text() == "lr = 1e-4\n"
    assert jobs.names() == ["first"] and jobs.status("first") == "running"
    with pytest.raises(LaunchError, match="first: is running"):
        jobs.start("second", "")
    assert not (folders.runs / "second").exists()
    with pytest.raises(ConfigError, match="is running"):
        jobs.resume("first")
    assert jobs.stop("first")
    jobs._processes["first"].wait()
    assert not jobs.is_running("first") and jobs.status("first") == "failed"
    with pytest.raises(ConfigError, match="choose another"):
        jobs.start("first", "")
    (work_dir / "iter_3").mkdir()
    jobs.resume("first")
    assert commands[-1][0][-1] == "--resume"
    jobs.stop("first")
    jobs._processes["first"].wait()


def test_a_run_of_another_terminal_is_found_and_stopped(folders):
    work_dir = folders.runs / "other"
    command = [sys.executable, "-c", HOLD, str(work_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        jobs = Jobs(folders)
        assert run_lock.is_held(work_dir) and run_lock.holder_pid(work_dir) == process.pid
        assert jobs.running() == ["other"]
        with pytest.raises(LaunchError, match="other: is running"):
            jobs.start("mine", "")
        assert jobs.stop("other")
        process.wait()
    assert run_lock.holder_pid(work_dir) is None and not jobs.stop("other")


def test_only_checkpoints_of_the_run_are_merged(site, commands):
    jobs = Jobs(site.folders)
    for checkpoint in ("../bob/iter_7", "iter_8", "", "/etc"):
        with pytest.raises(ConfigError, match="is not a checkpoint"):
            jobs.merge("ada", checkpoint)
    out = jobs.merge("ada", "iter_7")
    assert commands[0][0][3:5] == ["convert", "merge"] and out.name == "merged_iter_7"
    assert jobs.merging("ada") == ("running", out) and jobs.status("ada") == "finished"
    with pytest.raises(LaunchError, match="ada: is running"):
        jobs.start("mine", "")
    assert jobs.stop("ada")
    jobs._merges["ada"].process.wait()
    assert jobs.merging("ada") == ("failed", out) and jobs.status("ada") == "finished"
    (site.folders.runs / "ada" / module.MERGE_LOG).unlink()
