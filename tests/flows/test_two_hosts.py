"""Two network namespaces of this machine train together, as two hosts do.

They share the file system and nothing else: each has its own loopback interface, and one cable
joins them.
"""

import contextlib
import os
import subprocess
import sys

import pytest
from test_resume import losses, prepare
from test_several_processes import ALIKE

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
HOSTS = ("10.213.7.1", "10.213.7.2")
DIES = """
import os, signal
from xtuner.engine.hooks.base import BaseHook

class Die(BaseHook):
    collective = True

    def on_step(self, run):
        if os.environ["RANK"] == "1" and run.step == 3 and run.start_step == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts():
    """Names of two namespaces whose addresses are `HOSTS`."""
    names = [f"xtuner{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [f"xt{os.getpid() % 100000}{letter}" for letter in "ab"]
        first, second = zip(ends, names, strict=True)
        ip("link", "add", first[0], "netns", first[1], "type", "veth",
           "peer", "name", second[0], "netns", second[1])  # fmt: skip
        for end, name, address in zip(ends, names, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host, node, folder, *arguments):
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", *arguments]
    words = {"NPROC_PER_NODE": "1", "NNODES": "2", "NODE_RANK": str(node)}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command, "--set", *ALIKE],
        cwd=folder,
        env={**os.environ, **words, "ADDR": HOSTS[0], "PORT": "29517"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts_train_and_go_on_when_a_process_of_one_dies(tmp_path, tiny_model_path):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    (folder / "die.py").write_text(DIES, encoding="utf-8")
    chosen = ("max_steps=5", "save_steps=2", "accumulative_counts=1", "evaluation_inputs=[]")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            pytest.skip(f"network namespaces are not permitted here: {reason}")
        hook = "custom_hooks=['die.py:Die']"
        both = [
            start(host, node, folder, "--work-dir", "w", "--max-restarts", "1",
                  "--set", *chosen, hook)
            for node, host in enumerate(hosts)
        ]  # fmt: skip
        said = [process.communicate(timeout=800)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "done once for all 2 nodes, which share" in said[0]
    assert "Process 1 on node 1 was killed by SIGKILL" in said[0] and said[0].count("Done.") == 1
    assert "Restart 1 of 1, from the last checkpoint" in said[0]
    assert "Its last output" in said[1] or "It printed nothing" in said[1]
    assert sorted(losses(folder / "w")) == [1, 2, 3, 4, 5]
