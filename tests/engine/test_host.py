"""Threads and memory of the process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xtuner.engine import host


@pytest.fixture(autouse=True)
def same_threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_faster_count_is_taken_and_both_are_told(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(host, "matmul_rate", lambda threads, dtype: {1: 5e9, 2: 3e9}[threads])
    line = host.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 1
    assert "1 CPU thread" in line and "5 GFLOP/s with 1" in line and "3 GFLOP/s with 2" in line


def test_more_threads_are_taken_where_products_hardly_tell(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(host, "matmul_rate", lambda threads, dtype: {1: 5e9, 2: 4e9}[threads])
    host.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 2


def test_a_setting_is_obeyed():
    assert "as set" in host.choose_threads(3, torch.float32)
    assert torch.get_num_threads() == 3


def test_the_rate_is_a_rate():
    assert 1e8 < host.matmul_rate(1, torch.float32, size=128) < 1e14


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE.is_file() or "[never]" in HUGE.read_text(), reason="no huge pages on this system"
)
def test_huge_pages_come_to_what_is_used_later_and_asking_takes_no_memory():
    script = """
import torch
from pathlib import Path
from xtuner.engine import host

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
