"""Collective work of two processes: hooks, validation, answers, checkpoints, forward passes."""

import errno
from types import SimpleNamespace

import pytest
import torch
from recording_strategy import Sharded
from trainer_parts import make_samples, make_trainer

from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.config.schema import Settings
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.hooks.base import BaseHook
from xtuner.engine.strategies.replicated import Strategy
from xtuner.errors import DataError, LaunchError
from xtuner.parallel.processes import Processes
from xtuner.testing.run_distributed import run_distributed
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.training.evaluate import SampleAnswers, Validation

pytestmark = pytest.mark.distributed
SPLIT = [make_samples(2, seed=seed) for seed in range(5)]
"""Packs of a validation split: three for the first process and two for the second."""
UNEVEN = (
    [[make_samples(1, seed=1), make_samples(2, seed=2)], [make_samples(1, seed=3)]],
    [
        [make_samples(3, seed=4)],
        [],
    ],
)
"""Two steps' micro-batches, by rank; the second process has one less, and then none."""


class Everywhere(BaseHook):
    collective = True

    def __init__(self, processes):
        self.processes, self.seen = processes, []

    def on_step(self, run):
        self.seen.append(self.processes.sum([self.processes.rank + 1.0]))


class MainOnly(BaseHook):
    def __init__(self):
        self.seen = []

    def on_step(self, run):
        self.seen.append(run.step)


class Wrong(MainOnly):
    def on_step(self, run):
        self.processes.sum([1.0])


class BadRow(Everywhere):
    def on_step(self, run):
        if self.processes.rank == 1:
            raise DataError("rows.jsonl line 3: damaged")


def hooks(folder, processes):
    """What each hook saw, and the errors on all processes for a wrong hook and a bad row."""
    everywhere, main_only = Everywhere(processes), MainOnly()
    make_trainer(folder, [[make_samples(1)]], hooks=[main_only, everywhere], steps=2).fit()
    told = [failure(folder, hook) for hook in (Wrong(), BadRow(processes))]
    return everywhere.seen, main_only.seen, told


def failure(folder, hook):
    """The type of the error, its message, and how often the run saved."""
    saved = []
    groups = [[make_samples(1)]]
    trainer = make_trainer(folder, groups, hooks=[hook], save=saved.append, steps=2)
    hook.processes = trainer.processes
    with pytest.raises((LaunchError, DataError)) as caught:
        trainer.fit()
    return type(caught.value).__name__, str(caught.value), len(saved)


def collate(pack):
    return Algorithm().collate(pack)


def validation(folder, processes, kind):
    """The loss, and the number of forward passes."""
    trainer = make_trainer(folder, [[]], kind=kind)
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    found = Validation(trainer.strategy, SPLIT, Algorithm(), collate).measure()
    return found, len(passes), trainer.model.training


def uneven_steps(folder, processes, kind):
    """Forward passes of each step, and the weights."""

    class Broken(Algorithm):
        def loss(self, model, batch):
            output = super().loss(model, batch)
            bad = torch.nan if any(row.line == 2 for row in batch.rows) and broken else 1.0
            return type(output)(output.loss * bad)

    broken = False
    mine = [step[processes.rank] for step in UNEVEN]
    trainer = make_trainer(folder, mine, steps=2, kind=kind, algorithm=Broken(), lr=0.1)
    passes, seen = [], []
    trainer.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.fit()
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    seen.append(len(passes))
    broken = True  # the row is reported after the same number of passes
    passes.clear()
    found = trainer.gradients.rows_not_finite(next(trainer.loader.groups(0, 1)))
    return seen[0], len(passes), found, weights.double().sum().item()


def answers(processes):
    """Answers of models that differ between processes."""
    tokenizer = tiny_tokenizer()
    chosen = Settings(pretrained_model_name_or_path="m", data_path="d", evaluation_max_new_tokens=6)
    model = tiny_model(seed=processes.rank, initializer_range=0.5)
    parts = {
        "settings": chosen,
        "model": SimpleNamespace(model=model, autocast=None),
        "tokenizer": tokenizer,
        "template": templates.load("auto", tokenizer),
        "processes": processes,
    }
    questions = [(f"Number {i}?", ()) for i in range(3)]
    alone = SampleAnswers(**parts)
    own = [alone.answer(text) for text, _ in questions]
    return own, alone.answers(questions), SampleAnswers(**parts, sharded=True).answers(questions)


def checkpoints(folder, processes):
    """File names of a checkpoint that both wrote; the error for one that rank 1 cannot write."""
    store = CheckpointStore(folder / "store", limit=1)

    def write(draft):
        (draft / f"part_{processes.rank}").write_text("w")

    def fail(draft):
        write(draft)
        if processes.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = store.save(1, write, processes=processes)
    files = sorted(p.name for p in path.iterdir())
    processes.sum([0.0])  # a barrier
    with pytest.raises(LaunchError) as caught:
        store.save(2, fail, processes=processes)
    processes.sum([0.0])  # a barrier
    left = sorted(p.name for p in store.work_dir.iterdir())
    return files, str(caught.value), left


def everything(folder):
    processes = Processes("cpu")
    own = folder / str(processes.rank)
    own.mkdir(exist_ok=True)
    found = {
        "hooks": hooks(own, processes),
        "validation": [validation(own, processes, kind) for kind in (Strategy, Sharded)],
        "uneven": [uneven_steps(own, processes, kind) for kind in (Strategy, Sharded)],
        "answers": answers(processes),
        "checkpoints": checkpoints(folder, processes),
    }
    processes.close()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return run_distributed(everything, tmp_path_factory.mktemp("both"))


def test_a_collective_hook_runs_everywhere_and_the_others_on_the_main_process(both):
    for rank, found in enumerate(both):
        everywhere, main_only, _ = found["hooks"]
        assert everywhere == [[3.0], [3.0]]
        assert main_only == ([] if rank else [1, 2])


def test_hook_error_in_one_process_ends_all(both):
    for found in both:
        (kind, wrong, _), (bad_kind, bad, saved) = found["hooks"][2]
        assert (kind, "collective = True" in wrong) == ("LaunchError", True)
        assert (bad_kind, saved) == ("DataError", 1)
        assert "line 3: damaged; step 1 is saved" in bad


def test_validation_on_two_processes_is_that_on_one(both, tmp_path):
    trainer = make_trainer(tmp_path, [[]])
    alone = Validation(trainer.strategy, SPLIT, Algorithm(), collate).measure()
    plain, sharded = zip(*(found["validation"] for found in both), strict=True)
    for loss, _, training in (*plain, *sharded):
        assert loss == pytest.approx(alone, rel=1e-12) and training
    assert [passes for _, passes, _ in plain] == [3, 2]
    assert [passes for _, passes, _ in sharded] == [3, 3]


def test_sharded_weights_get_equally_many_forward_passes(both):
    plain, sharded = zip(*(found["uneven"] for found in both), strict=True)
    assert [passes for passes, *_ in plain] == [3, 1]
    assert [passes for passes, *_ in sharded] == [3, 3]
    assert [search for _, search, *_ in sharded] == [3, 3]  # rows of the first step, one by one
    assert [rows for *_, rows, _ in sharded] == [["rows.jsonl line 2"], []]
    assert len({weights for *_, weights in (*plain, *sharded)}) == 1


def test_answers_are_shared_out_or_given_together(both):
    first, second = (found["answers"] for found in both)
    assert all(a != b for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1] == [first[0][0], second[0][1], first[0][2]]
    assert first[2] == second[2] == first[0]


def test_a_checkpoint_is_written_by_all_ranks_or_by_none(both):
    for files, told, left in (found["checkpoints"] for found in both):
        assert files == ["manifest.json", "part_0", "part_1"]
        assert "process 1: cannot write checkpoint" in told and "No space left" in told
        assert "process 0" not in told
        assert left == ["iter_1", "last_checkpoint"]
