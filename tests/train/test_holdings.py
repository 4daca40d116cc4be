"""What the start of a run prints about each process."""

from pathlib import Path
from types import SimpleNamespace

import torch

from xtuner.config.schema import Settings
from xtuner.engine import strategies
from xtuner.training.holdings import holdings


def lines(strategy, processes):
    chosen = Settings(pretrained_model_name_or_path="m", data_path="d", strategy=strategy)
    kind = strategies.check(chosen, folder=Path())
    made = kind(chosen, SimpleNamespace(world_size=processes))
    made.model = made._inner = torch.nn.Linear(512, 512, bias=False)
    return [*holdings(made, weights=2**20, gradients=2**20, optimizer=2**21)]


def test_each_process_says_what_it_holds():
    assert not lines("replicated", 1)
    assert lines("replicated", 2) == [
        "Strategy     replicated: each of 2 processes holds weights 1.0 of 1.0 MiB, gradients "
        "1.0 of 1.0 MiB, optimizer 2.0 of 2.0 MiB, and the activations of its own rows"
    ]
    (line,) = lines("deepspeed_zero2_offload", 4)
    assert "gradients 0.2 of 1.0 MiB, optimizer 0.5 of 2.0 MiB (in CPU memory), and" in line
