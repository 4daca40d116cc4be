"""Batches and runs for tests of models and trainers."""

import torch
from rich.console import Console

from xtuner.config.schema import Settings
from xtuner.engine.hooks.base import Run
from xtuner.types import IGNORE_INDEX, Batch


def random_batch(*lengths, seed=0):
    """A packed row with samples of `lengths`, in which 60% of the tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(5, 250, (1, total), generator=generator)
    labels = torch.where(torch.rand(1, total, generator=generator) < 0.6, ids, IGNORE_INDEX)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels[0, cu_seqlens[:-1].long()] = IGNORE_INDEX
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, labels, positions, cu_seqlens)


def quiet_run(folder, steps, **settings):
    """A run that prints nothing, with a constant learning rate."""
    chosen = {"pretrained_model_name_or_path": "m", "data_path": "d"}
    chosen |= {"warmup_ratio": 0.0, "lr_schedule": "constant", **settings}
    return Run(
        settings=Settings(**chosen),
        work_dir=folder,
        log_dir=folder,
        console=Console(quiet=True),
        answer=lambda question: "",
        validate=None,
        total_steps=steps,
    )
