"""Processes of one machine get separate physical cores."""

import os
import threading

import pytest

from xtuner.device import cores


@pytest.fixture
def siblings(tmp_path, monkeypatch):
    """Four physical cores of two threads each, numbered as Linux does: 0 and 4 share one."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)


def test_threads_of_one_core_stay_together(siblings):
    found = cores.physical_cores(range(8))
    assert found == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert cores.share_of(found, 0, 2) == {0, 4, 1, 5}
    assert cores.share_of(found, 1, 2) == {2, 6, 3, 7}
    assert cores.share_of(found, 2, 3) == {2, 6}  # one core remains
    assert cores.share_of(found, 0, 5) == set()


def test_cores_that_are_not_allowed_are_not_used(siblings):
    assert cores.physical_cores({1, 5, 6}) == [{1, 5}, {6}]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_process_is_bound_once():
    found = []

    def bind():  # affinity belongs to a thread
        cores.bind_to_share.cache_clear()
        found.append(cores.bind_to_share(0, 1))
        found.append(cores.bind_to_share(1, 2))
        found.append(cores.bind_to_share(1, 2))
        found.append(len(os.sched_getaffinity(0)))

    thread = threading.Thread(target=bind)
    thread.start()
    thread.join()
    cores.bind_to_share.cache_clear()
    assert found[0] is None and found[1] == found[2]
    if len(cores.physical_cores(os.sched_getaffinity(0))) > 1:
        assert found[3] == found[1]
