"""Launching without torch: small scripts stand in for training processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import typer

from xtuner.cli import _launch
from xtuner.errors import LaunchError
from xtuner.parallel import attempt
from xtuner.parallel.cluster import Cluster, first_host, joined_by_slurm
from xtuner.parallel.launch import last_checkpoint_changes, launch

WAIT = "import time; time.sleep(60)"


def run(script, *, processes=2, **options):
    """The exit code of `script`, in which RANK and ATTEMPT are numbers."""
    head = (
        "import os, sys\nRANK, ATTEMPT = (int(os.environ[n]) for n in ('RANK', 'XTUNER_ATTEMPT'))"
    )
    code = f"{head}\n{textwrap.dedent(script)}"
    return launch([sys.executable, "-c", code], Cluster(processes), **options)


def test_processes_have_their_ranks(tmp_path):
    assert (
        run(
            f"""
            import json, socket
            names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'XTUNER_STORE_FD')
            seen = [os.environ.get(name) for name in names]
            if RANK == 0:
                listener = socket.socket(fileno=int(seen[-1]))
                seen += [listener.getsockname()[0], str(listener.getsockname()[1])]
            seen.append(os.environ['MASTER_PORT'])
            open({str(tmp_path)!r} + f'/{{RANK}}', 'w').write(json.dumps(seen))
            """
        )
        == 0
    )
    first, second = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert first[:4] == ["0", "0", "2", "127.0.0.1"]
    assert second[:5] == ["1", "1", "2", "127.0.0.1", None]
    # the store is only reachable from this machine
    assert first[5] == "127.0.0.1" and first[6] == first[7] == second[5]


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("sys.exit(3 if RANK == 0 else 0)", 3, ""),
        (
            f"print('no disk'); sys.exit(2) if RANK else None\n{WAIT}",
            2,
            "Process 1 failed with exit code 2. Its last output:\nno disk",
        ),
        ("sys.exit(2 if RANK else 75)", 2, "Process 1 failed with exit code 2."),
        (
            f"print('before', flush=True); os.kill(os.getpid(), 9) if RANK else None\n{WAIT}",
            137,
            "Process 1 was killed by SIGKILL, as the system does when memory runs out. Earlier "
            "checkpoints are untouched. Its last output:\nbefore",
        ),
        (
            f"(os.write(2, b'..'), os.kill(os.getpid(), 9)) if RANK == 0 else None\n{WAIT}",
            137,
            "..\nProcess 0 was killed",
        ),
        (
            f"os.kill(os.getpid(), 19) if RANK == 1 else None\n{WAIT}",
            137,
            "Process 1 was stopped for 0 s (SIGSTOP), so the run was ended.",
        ),
    ],
    ids=["main", "another", "follower", "killed", "main_killed", "stopped"],
)
def test_first_failure_is_reported_and_the_others_end(script, code, said, capfd, monkeypatch):
    monkeypatch.setattr(attempt, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(attempt, "STOPPED_SECONDS", 0.5)
    assert run(script) == code
    error = capfd.readouterr().err
    assert said in error and error.count("Process ") == bool(said)


def test_a_failed_run_goes_on_from_its_last_checkpoint(tmp_path, capfd):
    pointer = tmp_path / "last_checkpoint"
    pointer.write_text("iter_9")  # of an earlier run
    script = f"""
    seen = os.environ.get('XTUNER_RESUME', '-')
    if RANK == 0:
        open({str(tmp_path / "seen")!r}, 'a').write(seen)
        if ATTEMPT == 1:
            os.utime({str(pointer)!r}, ns=(1, 1))
    sys.exit(1 if RANK == ATTEMPT == 0 else 7 if ATTEMPT == 1 and RANK == 0 else 0)
    """
    can_resume = last_checkpoint_changes(pointer)
    assert run(script, max_restarts=2, can_resume=can_resume) == 0
    assert (tmp_path / "seen").read_text() == "--1"
    error = capfd.readouterr().err
    assert "Restart 1 of 2, from the beginning." in error
    assert "Restart 2 of 2, from the last checkpoint." in error


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1), (130, 1)])
def test_unrecoverable_failure_is_not_restarted(code, starts, tmp_path):
    script = f"open({str(tmp_path / 'n')!r}, 'a').write('x') if RANK == 0 else 0; sys.exit({code})"
    assert run(script, max_restarts=2) == code
    assert len((tmp_path / "n").read_text()) == starts


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_processes_end_with_their_launcher(tmp_path):
    child = (
        "import os, time; from xtuner.parallel.parent import end_with_parent; end_with_parent(); "
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid())); "
        "time.sleep(60)"
    )
    parent = (
        "import sys; from xtuner.parallel.launch import launch; "
        "from xtuner.parallel.cluster import Cluster; "
        f"launch([sys.executable, '-c', {child!r}], Cluster(2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    try:
        files = [tmp_path / name for name in "01"]
        _until(lambda: all(file.is_file() and file.read_text() for file in files))
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    pids = [int(file.read_text()) for file in files]
    _until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def _until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_wrong_cluster_names_all_that_is_wrong():
    with pytest.raises(LaunchError) as caught:
        Cluster.of(4, 2, node_rank="2", address=None, port="tcp://x")
    told = str(caught.value)
    assert all(name in told for name in ("NODE_RANK", "0 to 1", "ADDR", "PORT"))
    found = Cluster.of(4, 2, node_rank="1", address="10.0.0.1", port=None)
    assert (found.world_size, found.first_rank, found.port) == (8, 4, 29500)
    # variables that a platform sets for other purposes are ignored on one machine
    assert Cluster.of(4, 1, node_rank="x", address="y", port="tcp://z") == Cluster(4)


def test_slurm_gives_each_task_its_rank(monkeypatch):
    task = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    task |= {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    expected |= {"MASTER_ADDR": "gpu07", "MASTER_PORT": "23456", "GROUP_RANK": "1"}
    assert joined_by_slurm(task) == expected
    assert joined_by_slurm(task | {"PORT": "1234"})["MASTER_PORT"] == "1234"
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "123457"}]
    ports = {joined_by_slurm(task | other)["MASTER_PORT"] for other in [{}, *others]}
    assert len(ports) == 4
    with pytest.raises(LaunchError, match="not started by srun"):
        joined_by_slurm({})


def test_a_launcher_is_joined_and_tasks_that_nobody_joins_are_refused(monkeypatch):
    for name in ("RANK", "XTUNER_STORE_FD", "SLURM_PROCID", _launch.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(LaunchError, match="not started by torchrun"):
        _launch.join("pytorch", Cluster())
    with pytest.raises(typer.BadParameter, match="must be none, pytorch or slurm"):
        _launch.join("mpi", Cluster())
    os.environ |= {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"}
    with pytest.raises(LaunchError, match=r"2 tasks, .* --launcher slurm"):
        _launch.join(None, Cluster())
    _launch.join("slurm", Cluster())
    assert _launch.started_by_launcher() and _launch.world_size(Cluster()) == 2
    _launch.join("none", Cluster())
    assert not _launch.started_by_launcher()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],cpu1", "gpu03"), ("a-[2,4]", "a-2")],
    ids=["one", "two", "range", "list"],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_the_store_listens_on_the_given_address_only():
    for cluster, host in [
        (Cluster(2), "127.0.0.1"),
        (Cluster(1, 2, 0, "127.0.0.2", 0), "127.0.0.2"),
    ]:
        with cluster.listen() as listener:
            assert listener.getsockname()[0] == host
            with (
                pytest.raises(OSError),
                socket.create_connection(("127.0.0.3", listener.getsockname()[1]), timeout=5),
            ):
                pass
    assert Cluster(2).interface() == "lo"  # where gloo connects the processes


def test_a_port_that_is_taken_is_named():
    with Cluster().listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"{port}.*--master-port"):
            Cluster(1, 2, 0, "127.0.0.1", port).listen()
    assert "RANK" not in os.environ
