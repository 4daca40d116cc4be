"""The loop against the plain formula: the same gradient for every grouping; and what stops a
run."""

import errno
import io
import json
import math
import os
import resource
import signal
import sys
import weakref
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from trainer_parts import make_samples, make_trainer, weighted

from xtuner.algorithms.sft import Algorithm
from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine.checked_loss import checked_count
from xtuner.engine.hook_calls import HookCalls
from xtuner.engine.hooks.base import BaseHook
from xtuner.engine.seeds import micro_seed
from xtuner.engine.signals import Interrupted
from xtuner.errors import ConfigError, DataError, LaunchError, TrainingError
from xtuner.testing.run_distributed import run_distributed
from xtuner.testing.tiny import tiny_model
from xtuner.types import LossOutput


def weights_after_one_step(tmp_path, groups):
    trainer = make_trainer(tmp_path, groups)
    trainer.fit()
    return {n: p.detach().clone() for n, p in trainer.model.model.named_parameters()}


@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weighted"])
def test_first_step_equals_plain_transformers(tmp_path, weights):
    """With SGD and lr 1 the change of the weights is the gradient of the mean over all tokens, or
    of their weighted mean, sum(w * nll) / sum(w)."""
    samples = weighted(make_samples()) if weights else make_samples()
    model = tiny_model()
    total, count, divisor = 0.0, 0, 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        labels = torch.where(torch.from_numpy(sample.loss_mask), ids[0], -100)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        weight = torch.ones(len(ids[0])) if sample.weights is None else sample.weights
        weight = torch.as_tensor(weight)[1:] * (labels != -100)
        total = total + (each * weight).sum()
        count += int((labels != -100).sum())
        divisor += float(weight.double().sum())
    (total / divisor).backward()
    seen = []

    class Watch(BaseHook):
        def on_step(self, run):
            seen.append(dict(run.scalars))

    trainer = make_trainer(tmp_path, [[samples]], hooks=[Watch()])
    before = {n: p.detach().clone() for n, p in trainer.model.model.named_parameters()}
    trainer.fit()
    assert seen[0]["supervised_tokens"] == count
    assert abs(seen[0]["loss"] - (total / divisor).item()) < 1e-5
    gradients = dict(model.named_parameters())
    norm = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in model.parameters()))
    assert abs(seen[0]["grad_norm"] - norm) < 1e-4 * norm
    for name, after in trainer.model.model.named_parameters():
        change = before[name] - after.detach()
        assert (change - gradients[name].grad).abs().max() < 1e-5, name


def test_every_grouping_gives_one_gradient(tmp_path):
    samples = weighted(make_samples(8))
    groupings = {
        "1 x 8": [[samples]],
        "8 x 1": [[[s] for s in samples]],
        "3 + 4 + 1": [[samples[:3], samples[3:7], samples[7:]]],
    }
    results = {name: weights_after_one_step(tmp_path, g) for name, g in groupings.items()}
    reference = results.pop("1 x 8")
    for name, weights in results.items():
        worst = max(float((weights[n] - reference[n]).abs().max()) for n in reference)
        assert worst < 1e-6, (name, worst)


def test_weights_that_sum_to_less_than_one_are_divided_by_their_sum(tmp_path):
    """All weights equal is the same as no weights, however small they are."""
    samples = make_samples(2)
    small = [replace(s, weights=np.full(len(s.input_ids), 0.001, np.float32)) for s in samples]
    plain, scaled = (weights_after_one_step(tmp_path, [[group]]) for group in (samples, small))
    for name in plain:
        assert (plain[name] - scaled[name]).abs().max() < 1e-5, name


def test_a_micro_batch_with_nothing_to_learn_needs_no_gradient(tmp_path):
    class Picky(Algorithm):
        def count(self, batch):
            return np.int64(0 if 2 in {row.line for row in batch.rows} else batch.num_supervised)

        def loss(self, model, batch):
            output = super().loss(model, batch)
            return output if self.count(batch) else LossOutput(torch.zeros(()))

    first, second, third = ([sample] for sample in make_samples(3))
    trainer = make_trainer(
        tmp_path, [[first, second], [second], [third], [second]], steps=4, algorithm=Picky()
    )
    trainer.run.console = Console(file=io.StringIO(), width=200)
    trainer.fit()  # the second and the fourth step have no divisor
    assert trainer.run.step == 4 and trainer.run.scalars["loss"] == 0
    printed = trainer.run.console.file.getvalue()
    assert "step 2: Picky.count returned 0" in printed and printed.count("Picky") == 1
    with pytest.raises(ConfigError, match=r"Picky\.count returned 0 for every batch of a step"):
        make_trainer(tmp_path, [[second]], algorithm=Picky()).fit()


def test_a_detached_loss_of_a_batch_that_counts_is_refused(tmp_path):
    class Detached(Algorithm):
        def loss(self, model, batch):
            return LossOutput(super().loss(model, batch).loss.detach())

    with pytest.raises(ConfigError, match=r"Detached\.loss: the loss has no gradient"):
        make_trainer(tmp_path, [[make_samples(1)]], algorithm=Detached()).fit()


NUMBERS = [(3, 3), (0.5, 0.5), (np.int64(3), 3), (np.float32(0.5), 0.5), (np.array([2]), 2)]
NUMBERS += [(torch.tensor(3), 3), (torch.tensor([0.5]), 0.5), (Fraction(1, 2), 0.5)]


@pytest.mark.parametrize(("given", "number"), NUMBERS, ids=repr)
def test_a_count_is_any_number(given, number):
    assert checked_count(SimpleNamespace(count=lambda batch: given), None) == number


NO_COUNTS = [True, np.True_, torch.tensor(True), "3", np.str_("3"), None, -1, np.int64(-1)]
NO_COUNTS += [math.nan, torch.ones(2), np.ones(2), 1j, 10**400]


@pytest.mark.parametrize("given", NO_COUNTS, ids=lambda given: f"{given!r:.20}")
def test_a_count_that_is_no_number_is_refused(given):
    with pytest.raises(ConfigError, match=r"SimpleNamespace.count returned .* it must return a nu"):
        checked_count(SimpleNamespace(count=lambda batch: given), None)


def test_a_loss_that_is_not_finite_names_its_row_and_keeps_the_weights(tmp_path):
    samples = make_samples(3)

    class Exploding(Algorithm):
        def loss(self, model, batch):
            output = super().loss(model, batch)
            lines = {row.line for row in batch.rows}
            return type(output)(output.loss * (math.inf if 2 in lines else 1.0))

    saved = []
    trainer = make_trainer(
        tmp_path,
        [[samples[:1]], [samples]],
        steps=2,
        save=lambda run: saved.append(run.step),
        algorithm=Exploding(),
    )
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    assert "rows.jsonl line 2" in str(caught.value) and "line 1" not in str(caught.value)
    assert saved == [1] and trainer.run.step == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_sigterm_saves_the_last_finished_step_and_hooks_are_closed(tmp_path):
    events, saved = [], []

    class Killer(BaseHook):
        def on_step(self, run):
            if run.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_end(self, run):
            events.append("end")

        def close(self):
            events.append("close")

    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(
        tmp_path,
        [[make_samples(2)]],
        steps=9,
        hooks=[Killer()],
        save=lambda run: saved.append(run.step),
    )
    with pytest.raises(Interrupted, match="step 2"):
        trainer.fit()
    assert (saved, events) == ([2], ["close"])
    assert signal.getsignal(signal.SIGTERM) is handler


def test_hooks_close_after_an_error_in_one_of_them(tmp_path):
    closed = []

    class Broken(BaseHook):
        def on_step(self, run):
            raise RuntimeError("broken")

        def close(self):
            closed.append(True)

    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, [[make_samples(2)]], hooks=[Broken()]).fit()
    assert closed == [True]


def test_the_folder_of_hooks_writes_what_it_promises(tmp_path):
    import importlib

    from xtuner import plugins

    package = "xtuner.engine.hooks"
    hooks = [importlib.import_module(f"{package}.{n}").Hook() for n in plugins.names(package)]
    assert all(isinstance(hook, BaseHook) for hook in hooks)
    trainer = make_trainer(
        tmp_path,
        [[make_samples(2)], [make_samples(3)]],
        steps=4,
        lr=0.1,
        warmup_steps=3,
        evaluation_inputs=["Who are you?"],
        evaluation_freq=2,
    )
    trainer.run.answer = lambda question: "A tiny model."
    trainer.run.validate = lambda: 1.25
    trainer.hooks = HookCalls(
        [h for h in hooks if h.wanted(trainer.run)], trainer.run, trainer.processes
    )
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    wanted = {"lr", "loss", "grad_norm", "tokens_per_second", "supervised_tokens", "memory_mb"}
    assert wanted <= lines[1].keys() and lines[2]["val_loss"] == 1.25
    assert lines[2]["epoch"] == 1.0
    assert [line["lr"] for line in lines[1:5]] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    for step in (0, 2, 4):
        assert "A tiny model." in (tmp_path / f"eval_outputs_iter_{step}.txt").read_text()
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "step 4/4" in (tmp_path / f"{tmp_path.name}.log").read_text()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_micro_seeds_do_not_collide():
    seeds = {micro_seed(42, s, i, r) for s in range(50) for i in range(20) for r in range(4)}
    assert len(seeds) == 50 * 20 * 4


def test_out_of_memory_saves_the_last_complete_step_and_gives_advice(tmp_path, monkeypatch):
    saved = []
    trainer = make_trainer(
        tmp_path, [[make_samples()]], steps=3, save=lambda run: saved.append(run.step)
    )
    trainer.memory_advice = lambda: "batch_size = 1"
    loss = trainer.algorithm.loss

    def fail_at_step_2(model, batch):
        if trainer.run.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)

    monkeypatch.setattr(trainer.algorithm, "loss", fail_at_step_2)
    with pytest.raises(TrainingError, match=r"step 2: out of memory.*--resume.*batch_size = 1"):
        trainer.fit()
    assert saved == [1]


def test_other_faults_of_torch_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, [[make_samples()]])

    def fail(model, batch):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(trainer.algorithm, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.fit()


def allocated_until_refused():
    """In a separate process: what torch raises when memory is exhausted."""
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28,) * 2)
    kept = []
    try:
        while True:
            kept.append(torch.zeros(2**20))
    except RuntimeError as error:
        del kept
        return str(error), is_out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_cpu_out_of_memory_is_recognised():
    ((words, understood),) = run_distributed(allocated_until_refused, processes=1)
    assert understood, words


@pytest.mark.parametrize(
    ("error", "understood"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_what_is_a_lack_of_memory(error, understood):
    assert is_out_of_memory(error) == understood


class Watched(torch.Tensor):
    """A tensor that can be watched."""


def test_the_tensors_of_a_step_are_gone_when_the_last_whole_step_is_saved(tmp_path):
    alive, seen = [], []
    trainer = make_trainer(
        tmp_path,
        [[make_samples()]],
        steps=3,
        save=lambda run: seen.append([watch() for watch in alive]),
    )
    loss = trainer.algorithm.loss

    def fail_at_step_2(model, batch):
        activations = torch.zeros(2**20).as_subclass(Watched)
        if trainer.run.step == 1:
            alive.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)

    trainer.algorithm.loss = fail_at_step_2
    with pytest.raises(TrainingError, match="out of memory"):
        trainer.fit()
    assert seen == [[None]]


def test_save_without_memory_is_reported(tmp_path):
    def save(run):
        raise LaunchError("cannot write checkpoint iter_1: out of memory.")

    trainer = make_trainer(tmp_path, [[make_samples()]], steps=3, save=save)
    loss = trainer.algorithm.loss

    def fail_at_step_2(model, batch):
        if trainer.run.step == 1:
            raise MemoryError
        return loss(model, batch)

    trainer.algorithm.loss = fail_at_step_2
    with pytest.raises(
        TrainingError, match=r"step 2: out of memory.*The last step is lost"
    ) as told:
        trainer.fit()
    assert "--resume" not in str(told.value)


def test_bad_validation_row_loses_no_step(tmp_path):
    class Measure(BaseHook):
        def on_step(self, run):
            if run.step == 2:
                raise DataError("rows.jsonl line 3: image 'a.png' is damaged")

    saved = []
    trainer = make_trainer(
        tmp_path,
        [[make_samples()]],
        steps=5,
        hooks=[Measure()],
        save=lambda run: saved.append(run.step),
    )
    with pytest.raises(DataError, match=r"line 3: image 'a.png'.*step 2 is saved.*--resume"):
        trainer.fit()
    assert saved == [2]
