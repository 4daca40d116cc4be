"""A user's own algorithm on pairs: a margin between the chosen and the rejected answer."""

import json
from pathlib import Path

import pytest
import torch

from xtuner.cli.app import main
from xtuner.config.load import load_settings
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import make_trainable
from xtuner.training.data_parts import DataParts

ALGORITHM = '''
import torch
from xtuner.algorithms.base import BaseAlgorithm
from xtuner.types import LossOutput, Preference


class Margin(BaseAlgorithm):
    """The mean log-probability of the chosen answer exceeds the other by `margin`."""

    records = (Preference,)
    sequences_per_row = 2
    takes_images = False
    options = {"margin": 1.0}
    metrics = ("accuracy",)

    def encode(self, record, encoder):
        return [encoder.conversation(side) for side in (record.chosen, record.rejected)]

    def count(self, batch):
        return len(batch.rows)

    def loss(self, model, batch):
        scores, owner = model(batch), batch.sequence_of_predicting
        number = 2 * len(batch.rows)
        sums = torch.zeros(number, device=scores.device).index_add(0, owner, scores)
        means = sums / torch.bincount(owner, minlength=number)
        chosen, rejected = means.view(-1, 2).unbind(1)
        gap = chosen - rejected
        loss = torch.relu(self.option["margin"] - gap).sum()
        return LossOutput(loss, {"accuracy": (gap > 0).float().sum()})
'''
FAULTY = '''
from dataclasses import replace
from margin import Margin
import torch

class GivesTensor(Margin):
    def loss(self, model, batch):
        return super().loss(model, batch).loss

class GivesVector(Margin):
    def loss(self, model, batch):
        return replace(super().loss(model, batch), loss=-model(batch))

class NoGradient(Margin):
    def loss(self, model, batch):
        made = super().loss(model, batch)
        return replace(made, loss=made.loss.detach())

class MoreMetrics(Margin):
    def loss(self, model, batch):
        made = super().loss(model, batch)
        return replace(made, metrics={**made.metrics, "own": made.loss})

class CountsNothing(Margin):
    def count(self, batch):
        return 0

class LacksMetric(Margin):
    metrics = ("accuracy", "gap")

class OneSequence(Margin):
    def encode(self, record, encoder):
        return super().encode(record, encoder)[:1]

class NoEncoded(Margin):
    def encode(self, record, encoder):
        return [part.input_ids for part in super().encode(record, encoder)]

class Plain:
    pass

class NotFinite(Margin):
    """Where a row has the token that `margin` numbers."""
    def loss(self, model, batch):
        given = super().loss(model, batch)
        bad = (batch.input_ids == self.option["margin"]).any()
        return replace(given, loss=given.loss * float("nan")) if bad else given
'''
FORMAT = """
from xtuner.types import Conversation, Message, Preference

def to_pair(row):
    question, answers = Message("user", row["q"]), row["answers"]
    return Preference(*[Conversation((question, Message("assistant", a))) for a in answers])

def to_messages(row):
    return list(to_pair(row).chosen.messages)
"""
HOOK = """
from xtuner.engine.hooks.base import BaseHook

class Die(BaseHook):
    order = 99

    def on_step(self, run):
        if run.step == 3 and run.start_step == 0:
            raise RuntimeError("died on purpose")
"""
SETTINGS = """
pretrained_model_name_or_path = {model!r}
data_path = 'rows.jsonl'
dataset_format = 'my_format.py:to_pair'
algorithm = 'margin.py:Margin'
algorithm_options = {{'margin': 0.5}}
tuning = 'full'
dtype = 'float32'
max_length = 60
accumulative_counts = 2
max_epochs = 2
max_steps = 5
save_steps = 2
lr = 1e-2
validation_ratio = 0.2
evaluation_freq = 100
tensorboard = False
num_threads = 1
"""
ROWS = [{"q": f"{i}?", "answers": ["y" * (i % 5 + 1), "no" * (i % 4 + 1)]} for i in range(30)]


@pytest.fixture
def folder(tmp_path, tiny_model_path, monkeypatch):
    (tmp_path / "margin.py").write_text(ALGORITHM)
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "my_format.py").write_text(FORMAT)
    (tmp_path / "die.py").write_text(HOOK)
    (tmp_path / "config.py").write_text(SETTINGS.format(model=str(tiny_model_path)))
    write_rows(tmp_path, ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_rows(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def scalars(work_dir):
    """The logged scalars by step, over all starts; later starts win."""
    files = sorted(Path(work_dir).glob("2*/scalars.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {v["step"]: v for v in lines if "loss" in v}, [v for v in lines if "loss" not in v]


def opened(*overrides):
    parts = DataParts.open(load_settings("config.py", overrides=overrides))
    return parts, parts.build(quiet=True)


def samples_of(dataset):
    return [sample for index in range(len(dataset)) for sample in dataset[index]]


def plain_loss(causal, samples, margin):
    """The same with plain transformers, one sequence at a time."""
    total = torch.zeros(())
    for sample in samples:
        means, start = [], 0
        for length in sample.lengths:
            ids = torch.from_numpy(sample.input_ids[start : start + length])
            mask = torch.from_numpy(sample.loss_mask[start : start + length])
            scores = causal(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            means.append(scores.gather(1, ids[1:, None])[:, 0][mask[1:]].mean())
            start += length
        total = total + torch.relu(margin - (means[0] - means[1]))
    return total


def test_the_algorithm_is_short():
    assert len([line for line in ALGORITHM.splitlines() if line.strip()]) < 60


def test_loss_and_gradients_are_those_of_plain_transformers(folder):
    parts, data = opened()
    pack = max((data.train[i] for i in range(len(data.train))), key=len)
    assert len(pack) > 1  # pairs, none of which is split
    assert all(len(sample.lengths) == 2 for sample in samples_of(data.train))
    model = PackedCausalLM(
        make_trainable(parts.settings, dtype=torch.float32, device="cpu", recompute=False)
    ).train()
    batch = parts.algorithm.collate(pack)
    output = parts.algorithm.loss(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, parameters)
    model.causal.set_attn_implementation("eager")
    wanted_loss = plain_loss(model.causal, pack, 0.5)
    wanted = torch.autograd.grad(wanted_loss, parameters)
    assert parts.algorithm.count(batch) == len(pack)
    torch.testing.assert_close(output.loss, wanted_loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_run_logs_its_metric_divides_by_pairs_and_resumes_bit_for_bit(folder, capsys):
    assert main(["train", "config.py", "--work-dir", "straight"]) == 0
    steps, others = scalars("straight")
    assert sorted(steps) == [1, 2, 3, 4, 5]
    assert all(0 <= v["accuracy"] <= 1 for v in steps.values())
    assert steps[5]["loss"] < steps[1]["loss"] and steps[5]["accuracy"] > steps[1]["accuracy"]
    parts, data = opened()
    causal = make_trainable(parts.settings, dtype=torch.float32, device="cpu", recompute=False)
    causal.set_attn_implementation("eager")
    aside = samples_of(data.validation)
    before = next(v["val_loss"] for v in others if v["step"] == 0)
    with torch.no_grad():
        assert before == pytest.approx(float(plain_loss(causal, aside, 0.5)) / len(aside), rel=1e-4)
    broken = ["train", "config.py", "--work-dir", "broken", "--set", "custom_hooks=['die.py:Die']"]
    assert main(broken) == 2
    assert "died on purpose" in capsys.readouterr().err
    assert main([*broken, "--resume"]) == 0
    resumed, _ = scalars("broken")
    for name in ("loss", "grad_norm", "accuracy"):
        assert [v[name] for v in resumed.values()] == [v[name] for v in steps.values()]


LONG = {"q": "?", "answers": ["y" * 80, "n"]}


def test_an_overlong_row_is_cut_in_each_sequence(folder):
    write_rows(folder, [*ROWS[:4], LONG])
    _, data = opened("overlong=truncate", "validation_ratio=0")
    samples = samples_of(data.train)
    (cut,) = [sample for sample in samples if max(sample.lengths) == 60]
    (short,) = [s for s in samples_of(opened("max_length=200")[1].train) if s.row == cut.row]
    first, second = short.lengths
    assert cut.lengths == (60, second) and first > 60
    assert cut.input_ids.tolist() == [*short.input_ids[:60], *short.input_ids[first:]]
    assert cut.loss_mask.tolist() == [*short.loss_mask[:60], *short.loss_mask[first:]]


def test_an_overlong_row_is_dropped_or_refused(folder, capsys):
    write_rows(folder, [*ROWS[:4], LONG])
    _, data = opened("overlong=drop", "validation_ratio=0")
    assert len(samples_of(data.train)) == 4
    assert main(["train", "config.py", "--set", "overlong=error"]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl line 5" in error and "max_length" in error
    assert main(["train", "config.py", "--set", "overlong=split"]) == 2
    assert "'margin.py:Margin' supports 'auto', 'truncate'" in capsys.readouterr().err


def test_pairs_are_shown_and_checked(folder, capsys):
    assert main(["log-dataset", "config.py", "--show", "all"]) == 0
    shown = capsys.readouterr().out
    assert "«y" in shown and "«no" in shown and "rows.jsonl line" in shown
    assert main(["check-custom-dataset", "config.py"]) == 0
    assert "No bad rows." in capsys.readouterr().out
    write_rows(folder, [*ROWS[:4], {"q": "?", "answers": ["y", " "]}])
    assert main(["check-custom-dataset", "config.py"]) == 2
    assert "line 5  to_pair: rejected: has an empty assistant turn" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_names_its_row(folder, capsys):
    write_rows(folder, [*ROWS[:6], {"q": "?", "answers": ["yZ", "no"]}])
    code = opened()[0].tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    changes = [
        "algorithm='faulty.py:NotFinite'", f"algorithm_options={{'margin': {code}.0}}",
        "validation_ratio=0", "max_epochs=1",
    ]  # fmt: skip
    assert main(["train", "config.py", "--set", *changes]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl line 7" in error and error.count("rows.jsonl") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ["algorithm='faulty.py:GivesTensor'"],
            ["GivesTensor.loss returned a Tensor", "LossOutput"],
        ),
        (["algorithm='faulty.py:GivesVector'"], ["GivesVector.loss: loss is of shape"]),
        (["algorithm='faulty.py:NoGradient'"], ["NoGradient.loss: the loss has no gradient"]),
        (["algorithm='faulty.py:MoreMetrics'"], ["metric 'own'", "metrics = ('accuracy', 'own')"]),
        (["algorithm='faulty.py:CountsNothing'"], ["CountsNothing.count returned 0 for every"]),
        (["algorithm='faulty.py:LacksMetric'"], ["no metric 'gap'", "accuracy"]),
        (
            ["algorithm='faulty.py:OneSequence'"],
            ["returned 1 sequence for", "sequences_per_row is 2"],
        ),
        (["algorithm='faulty.py:NoEncoded'"], ["NoEncoded.encode made a list", "Encoded"]),
        (["algorithm='faulty.py:Plain'"], ["is not a subclass of", "BaseAlgorithm"]),
        (["algorithm_options={'margn': 1.0}"], ["no option 'margn'", "allowed: margin"]),
        (["algorithm_options={'margin': 'x'}"], ["margin = 'x'", "its default, 1.0"]),
        (
            ["dataset_format='my_format.py:to_messages'"],
            ["is read as Conversation", "requires Preference", "set another dataset_format"],
        ),
    ],
    ids=lambda value: value[0].split("=")[-1].strip("'{}") if "=" in value[0] else "",
)
def test_errors_are_one_message(change, words, folder, capsys):
    assert main(["train", "config.py", "--set", *change, "validation_ratio=0"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
