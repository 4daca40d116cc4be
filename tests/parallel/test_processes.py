"""Two processes give the gradient that one process gives, also when their shares are uneven."""

import os

import pytest
import torch

from xtuner.testing.run_distributed import run_distributed

pytestmark = pytest.mark.distributed


CASES = {
    "even": [(0, 4), (4, 8)],
    "uneven": [(0, 2), (2, 5), (5, 8)],  # the second process has one micro-batch less
    "empty": [(0, 8)],  # the second process has none
}
"""Which samples each micro-batch has."""


def train_one_step_of_each():
    """The results of `train_one_step`, by case."""
    from xtuner.parallel.processes import Processes

    processes = Processes("cpu")
    found = {case: train_one_step(processes, batches) for case, batches in CASES.items()}
    if processes.world_size > 1:
        found["store"] = look_into_stores(processes, Processes("cpu"))
    processes.close()
    return found


def look_into_stores(processes, restarted):
    """Whether this process finds what the main process puts into the store of `processes`, there
    and in the store of `restarted`, if torchrun counts another number of restarts on each node."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(processes.rank)
    if processes.is_main:
        processes.store.set("key", "")
    processes.gather([])
    return processes.store.check(["key"]), restarted.store.check(["key"])


def train_one_step(processes, micro_batches):
    """Weights after one step on every `world_size`-th micro-batch, as a flat list; the loss; and
    the number of its tokens."""
    import tempfile
    from pathlib import Path

    from trainer_parts import make_samples, make_trainer

    samples = make_samples(8)
    groups = [samples[start:end] for start, end in micro_batches]
    with tempfile.TemporaryDirectory() as folder:
        mine = groups[processes.rank :: processes.world_size]
        trainer = make_trainer(Path(folder), [mine])
        seen = {}

        class Loader:
            steps_per_epoch = 1

            def groups(self, start, stop):
                yield [trainer.algorithm.collate(part) for part in mine]

        trainer.loader = Loader()
        trainer.fit()
        seen = dict(trainer.run.scalars)
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    return weights.double().tolist(), seen["loss"], seen["supervised_tokens"]


@pytest.fixture(scope="module")
def alone():
    return train_one_step_of_each()


@pytest.fixture(scope="module")
def both():
    """The results of two processes, which are started once for all cases."""
    return run_distributed(train_one_step_of_each)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, alone, both):
    weights, loss, count = alone[case]
    for found in both:
        their_weights, their_loss, their_count = found[case]
        assert their_count == count
        assert abs(their_loss - loss) < 1e-5
        assert max(abs(a - b) for a, b in zip(their_weights, weights, strict=True)) < 1e-6


def test_all_processes_share_one_store_that_has_no_keys_of_an_earlier_attempt(both):
    assert [found["store"] for found in both] == [(True, False)] * 2


def broken():
    raise ValueError("on purpose")


def test_a_failing_process_is_reported():
    with pytest.raises(RuntimeError, match="on purpose"):
        run_distributed(broken)
