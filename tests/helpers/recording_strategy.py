"""A user's strategy: the replicated one, which records the trainer's calls."""

import os
from pathlib import Path

from xtuner.engine.strategies.replicated import Strategy

NAMES = (
    "prepare",
    "zero_grad",
    "backward",
    "reduce_gradients",
    "unscale",
    "clip_gradients",
    "step",
    "set_learning_rate",
    "trained_weights",
    "optimizer_state",
    "load_optimizer_state",
)


class Recording(Strategy):
    """Keeps the names of the calls, and writes them into the file $RECORDED if there is one."""

    def __init__(self, settings, processes):
        super().__init__(settings, processes)
        self.calls = []

    def note(self, name):
        self.calls.append(name)
        if path := os.environ.get("RECORDED"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")


def _noted(name):
    plain = getattr(Strategy, name)

    def call(self, *args, **options):
        self.note(name)
        return plain(self, *args, **options)

    return call


for _name in NAMES:
    setattr(Recording, _name, _noted(_name))


class Sharded(Recording):
    """Behaves as if every forward pass were collective."""

    sharded = lockstep = True
