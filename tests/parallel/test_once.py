"""One process works for the others: on one node, on two that share the folder, on two that do not.

Four threads stand in for processes, over a store in memory.
"""

import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from xtuner.errors import DataError, LaunchError, PeerLostError
from xtuner.parallel import once
from xtuner.parallel.once import Once, check_shared


def four(work, folder_of, *, per_node=4, call=lambda alone, work: alone.run(work)):
    """The result or error of `work` on each rank, and the note."""
    store, found = HashStore(), {}

    def one(rank):
        leader = rank // per_node * per_node
        processes = SimpleNamespace(
            rank=rank, world_size=4, is_main=rank == 0, store=store, node_leader=leader,
            node=rank // per_node, nodes=4 // per_node,
        )  # fmt: skip
        alone = Once(processes, folder_of(rank))
        try:
            found[rank] = call(alone, lambda: work(rank, folder_of(rank))), alone.note
        except Exception as error:
            found[rank] = error, alone.note

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank][0] for rank in range(4)], found[0][1]


def fill(rank, folder):
    """Fill the folder slowly, or find it filled; True if this process has filled it."""
    if (folder / "data").exists():
        return False
    time.sleep(0.5)
    (folder / "data").touch()
    return True


@pytest.mark.parametrize("per_node", [4, 2])
def test_one_process_works_for_all_that_share_the_folder(tmp_path, per_node):
    found, note = four(fill, lambda rank: tmp_path, per_node=per_node)
    assert found == [True, False, False, False]
    assert ("once for all 2 nodes" in note) == (per_node == 2)
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_each_node_works_for_itself_where_they_do_not_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(once, "NOTICE_SECONDS", 0.1)
    for name in "01":
        (tmp_path / name).mkdir()
    found, note = four(fill, lambda rank: tmp_path / str(rank // 2), per_node=2)
    assert found == [True, False, True, False]
    assert "done on 2 of 2 nodes" in note and "node 1" in note


def test_a_fault_ends_the_others_too(tmp_path):
    def fail(rank, folder):
        raise DataError("rows.jsonl line 3: damaged")

    found, _ = four(fail, lambda rank: tmp_path)
    assert [type(error) for error in found] == [DataError, *[PeerLostError] * 3]
    assert "process 0 failed" in str(found[1]) and "line 3: damaged" in str(found[1])


def two_nodes(folders):
    """The error on each of two nodes whose work dirs are `folders`."""
    barrier, rounds, found = threading.Barrier(2), [{}, {}], {}

    def one(rank):
        turns = iter(rounds)

        def gather(items):
            told = next(turns)
            told[rank] = items
            barrier.wait(20)
            return [item for _, part in sorted(told.items()) for item in part]

        processes = SimpleNamespace(
            rank=rank, node=rank, nodes=2, node_leader=rank, is_main=rank == 0, gather=gather
        )
        try:
            found[rank] = check_shared(processes, folders[rank])
        except LaunchError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_work_dir_that_a_node_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(once, "NOTICE_SECONDS", 0.1)
    shared, other = tmp_path / "shared", tmp_path / "other"
    assert two_nodes([shared, shared]) == {0: None, 1: None}
    told = two_nodes([shared, other])
    assert all("node 1 of 2 does not see the folder" in text for text in told.values())
    assert list(shared.iterdir()) == [] and not other.exists()


def test_others_go_on_once_the_main_process_is_done(tmp_path):
    def locked(alone, work):
        alone.on_main("lock", work)
        return (tmp_path / "data").exists()

    found, _ = four(fill, lambda rank: tmp_path, call=locked)
    assert found == [True] * 4

    def held(rank, folder):
        raise LaunchError(f"{folder.name}: another run is writing to it")

    first, *others = four(held, lambda rank: tmp_path, call=locked)[0]
    assert isinstance(first, LaunchError) and not isinstance(first, PeerLostError)
    for error in others:
        assert isinstance(error, PeerLostError)
        assert "process 0 failed" in str(error) and "another run" in str(error)
