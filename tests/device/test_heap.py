"""When memory of the heap is returned."""

import pytest

from xtuner.device import heap
from xtuner.device.heap import Growth

GB = 2**30


def simulate(taken, kept, passes, *, start=GB):
    """Resident memory before each decision, and how often memory is returned.

    Args:
        taken: what a pass takes and frees; the heap keeps it until it is returned.
        kept: what a pass adds that the heap never uses again.
    """
    growth, seen, returned = Growth(), [], 0
    lost, level = 0, start
    for _ in range(passes):
        lost += kept
        level = start + taken + lost
        seen.append(level)
        if growth.exceeds(level):
            lost, returned = 0, returned + 1
    return seen, returned


def test_a_steady_run_returns_nothing():
    assert simulate(taken=GB, kept=0, passes=50)[1] == 0


@pytest.mark.parametrize("kept", [GB // 50, GB // 2])
def test_a_heap_that_grows_is_bounded(kept):
    seen, returned = simulate(taken=GB, kept=kept, passes=200)
    assert max(seen) <= 1.25 * (2 * GB + kept) + GB // 4 + kept
    assert 0 < returned <= 101


def test_larger_passes_become_the_level():
    """Training after sample answers: memory is returned once, then the passes are known."""
    growth = Growth()
    assert not growth.exceeds(GB)
    assert [growth.exceeds(3 * GB) for _ in range(10)] == [True] + 9 * [False]
    assert growth.exceeds(5 * GB)


def test_smaller_passes_become_the_level_again():
    """Sample answers after training: what they leave is returned early."""
    growth = Growth(level=8 * GB)
    assert not any(growth.exceeds(GB) for _ in range(150))
    assert growth.exceeds(2 * GB)


def test_memory_is_returned_through_the_c_library(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(heap, "_growth", Growth(level=1))
    monkeypatch.setattr(heap, "_private_bytes", lambda: 4 * GB)
    heap.trim_if_grown()
    heap.trim_if_grown()
    assert calls == [0]
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.trim_if_grown()
