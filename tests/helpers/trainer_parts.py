"""Batches and runs for tests of models and trainers."""

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from xtuner.algorithms.sft import Algorithm
from xtuner.config.schema import Settings
from xtuner.engine.hooks.base import Run
from xtuner.engine.strategies.replicated import Strategy
from xtuner.engine.trainer import Trainer
from xtuner.kernels.attention import packed as attention
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.parallel.processes import Processes
from xtuner.testing.tiny import tiny_model
from xtuner.types import IGNORE_INDEX, Batch, RowRef, Sample


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


def make_samples(count=8, seed=0):
    generator = np.random.default_rng(seed)
    samples = []
    for line in range(1, count + 1):
        length = int(generator.integers(4, 30))
        mask = generator.random(length) < 0.5
        mask[-1] = True
        ids = generator.integers(5, 261, length)
        samples.append(Sample(ids.astype(np.int64), mask, RowRef("rows.jsonl", line)))
    return samples


class FixedGroups:
    """Gives the same groups of micro-batches in every epoch."""

    def __init__(self, groups):
        self._groups = groups
        self.steps_per_epoch = len(groups)

    def groups(self, start_step, stop_step):
        for step in range(start_step, stop_step):
            yield [Algorithm().collate(part) for part in self._groups[step % len(self._groups)]]

    def filler(self):
        return Algorithm().collate(make_samples(1, seed=99))


def make_trainer(
    tmp_path,
    groups,
    *,
    steps=1,
    hooks=(),
    model=None,
    save=None,
    algorithm=None,
    kind=Strategy,
    processes=None,
    **settings,
):
    attention.register()
    model = model or tiny_model()
    model.set_attn_implementation(attention.NAME)
    packed = PackedCausalLM(model)
    run = quiet_run(tmp_path, steps, **{"max_norm": None, "lr": 1.0, **settings})
    strategy = kind(run.settings, processes or Processes("cpu"))
    if strategy.processes.sequence is not None:
        packed.split_rows(strategy.processes.sequence)
    strategy.prepare(packed, lambda prepared: torch.optim.SGD(prepared.parameters(), lr=1.0))
    run.is_main = strategy.processes.is_main
    return Trainer(
        strategy=strategy,
        algorithm=algorithm or Algorithm(),
        loader=FixedGroups(groups),
        run=run,
        hooks=hooks,
        save=save or (lambda run: None),
    )


def weighted(samples, seed=0):
    """Every other of `samples`, with random loss weights."""
    generator = np.random.default_rng(seed)
    return [
        replace(s, weights=generator.uniform(0.01, 3, len(s.input_ids)).astype(np.float32))
        if n % 2
        else s
        for n, s in enumerate(samples)
    ]
