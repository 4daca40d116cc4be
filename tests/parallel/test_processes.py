"""Two processes give the gradient that one process gives, also when their shares are uneven."""

import pytest
import torch

from xtuner.testing.run_distributed import run_distributed

pytestmark = pytest.mark.distributed


def train_one_step(micro_batches):
    """Weights after one step on every `world_size`-th micro-batch, as a flat list."""
    import tempfile
    from pathlib import Path

    from test_trainer import make_samples, make_trainer

    from xtuner.parallel.processes import Processes

    processes = Processes("cpu")
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
    processes.close()
    return weights.double().tolist(), seen["loss"], seen["supervised_tokens"]


@pytest.mark.parametrize(
    "micro_batches",
    [
        [(0, 4), (4, 8)],
        [(0, 2), (2, 5), (5, 8)],  # the second process has one micro-batch less
        [(0, 8)],  # the second process has none
    ],
    ids=["even", "uneven", "empty"],
)
def test_two_processes_equal_one(micro_batches):
    alone, loss, count = train_one_step(micro_batches)
    for weights, their_loss, their_count in run_distributed(train_one_step, micro_batches):
        assert their_count == count
        assert abs(their_loss - loss) < 1e-5
        assert max(abs(a - b) for a, b in zip(weights, alone, strict=True)) < 1e-6


def broken():
    raise ValueError("on purpose")


def test_a_failing_process_is_reported():
    with pytest.raises(RuntimeError, match="on purpose"):
        run_distributed(broken)
