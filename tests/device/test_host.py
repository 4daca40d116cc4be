"""Memory of the process."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE.is_file() or "[never]" in HUGE.read_text(), reason="no huge pages on this system"
)
def test_huge_pages_come_to_what_is_used_later_and_asking_takes_no_memory():
    script = """
import torch
from pathlib import Path
from xtuner.device import host

def held(name):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

host.keep_freed_memory()
before = held("Rss")
asked = host.ask_for_huge_pages()
print(asked, held("Rss") - before, end=" ")
before = held("AnonHugePages")
x = torch.ones(25 * 2**20)
print(held("AnonHugePages") - before)
"""
    asked, taken, huge = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    assert asked == "True"
    assert int(taken) < 10 * 1024  # KiB
    assert int(huge) > 80 * 1024  # of 100 MiB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_blocks_can_be_returned_while_others_stay():
    script = """
import psutil, torch
from xtuner.device import host

def left(count, size):
    before = psutil.Process().memory_info().rss
    held = [torch.ones(size * 2**18) for _ in range(count)]
    between = torch.ones(2**10)  # the heap does not end with them
    del held
    return (psutil.Process().memory_info().rss - before) >> 20

torch.ones(1)
print(host.keep_freed_memory(), left(4, 32), host.return_blocks_from(2**24), left(4, 40))
"""
    kept, first, returned, large = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    if kept == returned == "True":  # glibc
        assert int(first) > 100  # of 128 MiB
        assert int(large) < 20  # of 160 MiB
