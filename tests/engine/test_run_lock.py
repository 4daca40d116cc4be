"""Two runs never write to one work dir, and a dead run holds no lock."""

import os
import subprocess
import sys
import threading

import pytest

from xtuner.cli.app import main
from xtuner.engine import run_lock
from xtuner.errors import LaunchError

HOLD = """
import sys
from pathlib import Path
from xtuner.engine import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `tmp_path` until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_names_the_first(tmp_path, other):
    words = rf"another run is writing to it \(process {other.pid} on .*started .*--wait"
    with pytest.raises(LaunchError, match=words), run_lock.hold(tmp_path):
        pass
    with run_lock.hold(tmp_path / "elsewhere"):
        pass


def test_killed_run_releases_the_lock(tmp_path, other):
    other.kill()
    other.wait()
    assert (tmp_path / run_lock.FILE_NAME).read_text()  # it had no time to remove it
    with run_lock.hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / run_lock.FILE_NAME).read_text()
    with run_lock.hold(tmp_path):
        pass


def test_a_worker_that_outlives_a_killed_run_holds_nothing(tmp_path):
    forking = HOLD.replace(
        "    print", "    import os, time; os.fork() or time.sleep(60)\n    print"
    )
    with subprocess.Popen(
        [sys.executable, "-c", forking, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.stdin.close()
        process.wait(10)
        with run_lock.hold(tmp_path):
            pass
        os.killpg(process.pid, 9)


def test_waiting_ends_with_the_other_run(tmp_path, other, capsys):
    def end():
        other.stdin.write("\n")
        other.stdin.flush()

    threading.Timer(0.2, end).start()
    run_lock.wait_until_free(tmp_path, poll_seconds=0.05)
    assert f"Waiting for the run in {tmp_path} (process {other.pid}" in capsys.readouterr().err
    with run_lock.hold(tmp_path):
        pass


WAIT = """
import os, sys, time
from pathlib import Path
from xtuner.engine import run_lock
folder, output = Path(sys.argv[1]), Path(sys.argv[2])
print("waiting", flush=True)
run_lock.wait_until_free(folder, poll_seconds=0.02)
time.sleep(0.3)  # another waiting run may take the lock now
with run_lock.hold(folder, wait=True, poll_seconds=0.02):
    before = output.read_text()
    time.sleep(0.1)
    output.write_text(f"{before}{os.getpid()} ")
"""


def test_runs_that_wait_for_one_work_dir_get_it_in_turn(tmp_path, other):
    output = tmp_path / "output"
    output.touch()
    command = [sys.executable, "-c", WAIT, str(tmp_path), str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for run in runs:
        assert run.stdout.readline() == "waiting\n"
        assert f"(process {other.pid} on" in run.stderr.readline()
    other.kill()
    later = [run.communicate(timeout=30)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0, 0], later
    assert sorted(output.read_text().split()) == sorted(str(run.pid) for run in runs)


def test_without_a_run_nothing_is_waited_for(tmp_path, capsys):
    run_lock.wait_until_free(tmp_path / "new")
    with run_lock.hold(tmp_path):
        pass
    run_lock.wait_until_free(tmp_path)
    assert not capsys.readouterr().err


def test_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock.hold(tmp_path):
        pass
    assert "has no locks" in caplog.text


def test_the_command_names_the_other_run_and_can_wait(tmp_path, other, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(
        "pretrained_model_name_or_path = './no_model'\ndata_path = 'd.jsonl'\n"
    )
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "no_model").mkdir()
    (tmp_path / "no_model" / "config.json").write_text('{"model_type": "llama"}')
    command = ["train", "c.py", "--work-dir", str(tmp_path), "--device", "cpu"]
    assert main(command) == 2
    assert f"another run is writing to it (process {other.pid}" in capsys.readouterr().err
    other.stdin.write("\n")
    other.stdin.flush()
    assert main([*command, "--wait"]) == 2
    assert "no_model" in capsys.readouterr().err  # it reached the next error
