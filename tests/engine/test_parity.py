"""Losses, gradients and weights of two processes under every strategy are those of one process on
the same samples, whether they take different rows or parts of the same ones.

A few cases always run; the complete matrix is slow. Processes are started once for each.
"""

import itertools

import numpy as np
import pytest
import torch
from sharded_cases import case, frees_at_once, fused_case, model_of

from xtuner.hub import old_pth
from xtuner.parallel.processes import Processes
from xtuner.testing.run_distributed import run_distributed

ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
OFFLOADED = ("deepspeed_zero2_offload", "deepspeed_zero3_offload")
TUNINGS, ACCUMULATIONS = ("full", "lora"), (1, 4)
FEW = [("fsdp2", "full", 4), ("deepspeed_zero1", "lora", 4), ("deepspeed_zero3", "lora", 4)]
ALL = [
    *itertools.product(("replicated", "fsdp2", *ZERO), TUNINGS, ACCUMULATIONS),
    *itertools.product(OFFLOADED, TUNINGS, (4,)),
]


SPLIT = [("fsdp2", "lora", 1), ("deepspeed_zero3", "full", 1)]
"""Cases whose rows are split over two processes."""


def run_all(cases, split=(), folder=None, fused=()):
    """The results of `cases` on this process, and of `split` with rows split over two; DeepSpeed
    saves its own checkpoints in `folder`. Last those of fused layers under the strategies
    `fused`."""
    processes = Processes("cpu")

    def save(strategy):
        if folder is not None and hasattr(strategy, "engine"):
            strategy.engine.save_checkpoint(folder, tag=strategy.config.name)

    found = [case(processes, *each, then=save) for each in cases]
    if split:
        processes = Processes("cpu", sequence_parallel_size=2)
        found += [case(processes, *each) for each in split]
    if fused:
        processes = Processes("cpu")
        found += [fused_case(processes, name, folder, "nf4", recompute=True) for name in fused]
    processes.close()
    return found


def assert_alike(cases, results):
    """Compare with a replicated run on one process."""
    alone = {}
    for (strategy, *work), (losses, norms, weights) in zip(cases, results, strict=True):
        key = tuple(work)
        if key not in alone:
            alone[key] = case(Processes("cpu"), "replicated", *work)
        expected_losses, expected_norms, expected = alone[key]
        assert losses == pytest.approx(expected_losses, abs=1e-5), (strategy, work)
        assert norms == pytest.approx(expected_norms, rel=1e-5), (strategy, work)
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            # A moment of Adam may be as small as the rounding of its gradient.
            message = f"{strategy} {work} {name}"
            np.testing.assert_allclose(value, expected[name], atol=1e-4, err_msg=message)


def assert_read(folder, tuning, weights):
    """DeepSpeed's own checkpoint in `folder` contains the trained and all other weights."""
    found = old_pth.read(folder)
    for name, value in weights.items():
        assert np.array_equal(found[name].numpy(), value), name
    for name, parameter in model_of(tuning).named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(found[name], parameter), name
    assert old_pth.is_old(folder) and old_pth.is_old(folder.parent)


@pytest.mark.distributed
def test_two_processes_give_the_gradients_of_one(tmp_path):
    zero3 = frees_at_once(tmp_path)
    first, second = run_distributed(run_all, FEW, SPLIT, tmp_path, ("replicated", zero3))
    (*first, (whole, _), (sharded, freed)), (*second, _, (others, _)) = first, second
    assert sharded == others and freed == 0
    for found, wanted in zip(sharded, whole, strict=True):  # of layers that read weights uncalled
        assert found == pytest.approx(wanted, rel=1e-6)
    assert_alike([*FEW, *SPLIT], first)
    for (strategy, tuning, _), (*_, weights) in zip(FEW[1:], first[1:], strict=False):
        assert_read(tmp_path / strategy, tuning, weights)
    assert [losses for losses, *_ in first] == [losses for losses, *_ in second]
    assert all(not weights for *_, weights in second)  # only the main process gets them


@pytest.mark.slow
@pytest.mark.distributed
def test_every_strategy_gives_the_gradients_of_one_process(tmp_path):
    results = run_distributed(run_all, ALL, (), tmp_path)[0]
    assert_alike(ALL, results)
    saved = {
        strategy: (tuning, weights)
        for (strategy, tuning, _), (*_, weights) in zip(ALL, results, strict=True)
    }
    for strategy in (*ZERO, *OFFLOADED):
        assert_read(tmp_path / strategy, *saved[strategy])
    alone = [(strategy, "full", 4) for strategy in ("fsdp2", *ZERO, *OFFLOADED)]
    assert_alike(alone, run_all(alone))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_every_strategy_takes_rows_that_are_split(processes):
    """Four processes are two data groups of two."""
    cases = list(itertools.product(("replicated", "fsdp2", *ZERO), TUNINGS, (1,)))
    found = run_distributed(run_all, [], cases, processes=processes, timeout=1500)
    assert_alike(cases, found[0])
