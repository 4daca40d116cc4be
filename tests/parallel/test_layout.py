"""Data ranks and sequence ranks, as numbers and as groups of real processes."""

import pytest

from xtuner.config.schema import Settings
from xtuner.errors import LaunchError
from xtuner.parallel.layout import RankLayout
from xtuner.parallel.sequence_check import check_sequence_parallel
from xtuner.testing.run_distributed import run_distributed


def test_the_ranks_of_a_sequence_are_neighbours():
    layouts = [RankLayout(rank, 8, 2) for rank in range(8)]
    assert [layout.data_rank for layout in layouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [layout.sequence_rank for layout in layouts] == [0, 1] * 4
    for layout in layouts:
        assert layout.rank == layout.data_rank * 2 + layout.sequence_rank
        assert (layout.data_world_size, layout.sequence_world_size) == (4, 2)
        assert layout.rank in layout.sequence_groups()[layout.data_rank]


def test_one_sequence_rank_is_plain_data_parallelism():
    assert [RankLayout(rank, 3).data_rank for rank in range(3)] == [0, 1, 2]


def test_a_size_that_does_not_divide_the_processes_is_refused():
    with pytest.raises(LaunchError, match=r"4 processes.*groups of 3.*can be 1, 2, 4"):
        RankLayout(0, 4, 3)
    with pytest.raises(LaunchError, match=r"there is one: start 2 with --nproc 2"):
        RankLayout(0, 1, 2)


def test_more_processes_than_attention_heads_are_refused_before_launch(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 2}}')
    chosen = {"pretrained_model_name_or_path": str(tmp_path), "data_path": "d"}
    check_sequence_parallel(Settings(**chosen, sequence_parallel_size=2), 4)
    with pytest.raises(LaunchError, match="2 attention heads, so the maximum is 2"):
        check_sequence_parallel(Settings(**chosen, sequence_parallel_size=4), 4)


def sums():
    """The rank's layout, and the sum of the ranks that share its rows."""
    import torch

    from xtuner.parallel.processes import Processes

    processes = Processes("cpu", sequence_parallel_size=2)
    number = torch.tensor(10.0**processes.rank)
    processes.sequence.sum(number)
    layout = (processes.data_rank, processes.data_world_size, processes.layout.sequence_rank)
    processes.close()
    return layout, int(number)


@pytest.mark.distributed
def test_four_processes_form_two_groups():
    assert run_distributed(sums, processes=4) == [
        ((0, 2, 0), 11),
        ((0, 2, 1), 11),
        ((1, 2, 0), 1100),
        ((1, 2, 1), 1100),
    ]
