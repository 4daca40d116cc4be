"""Data ranks and sequence ranks, as numbers and as groups of real processes."""

import pytest

from xtuner.errors import LaunchError
from xtuner.parallel.layout import RankLayout
from xtuner.testing.run_distributed import run_distributed


def test_the_ranks_of_a_sequence_are_neighbours():
    places = [RankLayout(rank, 8, 2) for rank in range(8)]
    assert [place.data_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.sequence_rank for place in places] == [0, 1] * 4
    for place in places:
        assert place.rank == place.data_rank * 2 + place.sequence_rank
        assert (place.data_world_size, place.sequence_world_size) == (4, 2)
        assert place.rank in place.data_groups()[place.sequence_rank]
        assert place.rank in place.sequence_groups()[place.data_rank]


def test_one_sequence_rank_is_plain_data_parallelism():
    assert [RankLayout(rank, 3).data_rank for rank in range(3)] == [0, 1, 2]
    assert RankLayout(2, 3).data_groups() == [[0, 1, 2]]


def test_a_size_that_does_not_divide_the_processes_is_refused():
    with pytest.raises(LaunchError, match=r"4 processes.*groups of 3.*may be 1, 2, 4"):
        RankLayout(0, 4, 3)


def sums():
    """The rank's place, and the sums of all ranks over its two groups."""
    import torch
    import torch.distributed as dist

    from xtuner.parallel.processes import Processes

    processes = Processes("cpu", sequence_parallel_size=2)
    found = []
    for group in (processes.data_group, processes.sequence_group):
        number = torch.tensor(10.0**processes.rank)
        dist.all_reduce(number, group=group)
        found.append(int(number))
    place = (processes.data_rank, processes.data_world_size, processes.layout.sequence_rank)
    processes.close()
    return place, found


@pytest.mark.distributed
def test_four_processes_form_both_groups():
    assert run_distributed(sums, processes=4) == [
        ((0, 2, 0), [101, 11]),
        ((0, 2, 1), [1010, 11]),
        ((1, 2, 0), [101, 1100]),
        ((1, 2, 1), [1010, 1100]),
    ]
