"""The loss scaler by itself, and in the training loop compared with float32."""

import math

import pytest
import torch
from trainer_parts import FixedGroups, quiet_run

from xtuner.algorithms.sft import Algorithm
from xtuner.config.schema import Settings
from xtuner.engine.hooks.base import BaseHook
from xtuner.engine.optimizer import loss_scaler
from xtuner.engine.optimizer.loss_scaler import (
    GROWTH_STEPS,
    INITIAL_SCALE,
    LARGEST_SCALE,
    LossScaler,
)
from xtuner.engine.resume import identity_of
from xtuner.engine.signals import Interrupted
from xtuner.engine.strategies.replicated import Strategy
from xtuner.engine.trainer import Trainer
from xtuner.engine.training_state import load_state, save_state
from xtuner.errors import TrainingError
from xtuner.kernels.attention import packed
from xtuner.kernels.fused import attention as fused_attention
from xtuner.kernels.fused import norm_mlp
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.parallel.processes import Processes
from xtuner.testing.run_distributed import run_distributed
from xtuner.testing.tiny import tiny_model
from xtuner.types import RowRef, Sample


def test_a_scaled_loss_gives_the_gradients_of_the_loss():
    weight = torch.randn(7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = torch.autograd.grad(weight.square().sum(), weight)[0]
    scaler = LossScaler(scale=2.0**20)
    scaler.scaled(weight.square().sum()).backward()
    assert torch.equal(weight.grad, wanted * 2**20)
    assert torch.equal(weight.grad * scaler.inverse, wanted)
    loss = weight.sum()
    assert LossScaler(enabled=False).scaled(loss) is loss


def test_the_scale_doubles_after_good_steps_and_halves_after_an_overflow():
    scaler = LossScaler(scale=8.0)
    for _ in range(GROWTH_STEPS - 1):
        scaler.step_taken()
    assert scaler.scale == 8
    scaler.step_taken()
    assert scaler.scale == 16
    assert scaler.lower() and scaler.lower() and scaler.scale == 4
    scaler.step_taken()
    assert scaler.state_dict() == {"scale": 4, "good_steps": 1}
    assert scaler.lower() and scaler.lower() and not scaler.lower() and scaler.scale == 1
    top = LossScaler(scale=LARGEST_SCALE)
    for _ in range(GROWTH_STEPS + 1):
        top.step_taken()
    assert top.scale == LARGEST_SCALE


def test_aborted_step_leaves_the_state_unchanged():
    scaler = LossScaler(scale=8.0)
    scaler.step_taken()
    scaler.lower()
    assert scaler.state_dict() == {"scale": 8, "good_steps": 1}
    again = LossScaler()
    again.load_state_dict(scaler.state_dict())
    assert again.scale == 8 and again.state_dict() == scaler.state_dict()


def test_other_number_types_have_no_scale():
    for dtype in (torch.float32, torch.bfloat16):
        scaler = LossScaler.for_dtype(dtype)
        scaler.step_taken()
        assert (scaler.scale, scaler.lower(), scaler.state_dict()) == (1, False, {})
    scaler = LossScaler.for_dtype(torch.float16)
    scaler.load_state_dict({})  # of a checkpoint that bfloat16 wrote
    assert scaler.scale == INITIAL_SCALE


def samples(count, seed=0):
    """Samples of learnable text: counting."""
    found = []
    for line in range(1, count + 1):
        length = 8 + 3 * (line * (seed + 3) % 5)
        ids = 5 + (torch.arange(length) * (1 + line % 3) + 17 * line) % 250
        mask = torch.arange(length) > 2
        found.append(Sample(ids.numpy(), mask.numpy(), RowRef("rows.jsonl", line)))
    return found


class Watch(BaseHook):
    def __init__(self):
        self.seen = []

    def on_step(self, run):
        self.seen.append(dict(run.scalars))


def make_trainer(
    folder, dtype, *, steps, full=False, groups=None, scale=None, algorithm=None, **settings
):
    """A trainer as created by `xtuner.training.run`, and a hook that records its numbers."""
    torch.manual_seed(0)
    model = tiny_model(initializer_range=0.2)
    packed.register()
    model.set_attn_implementation(packed.NAME)
    model = model.float() if full else model.to(dtype)
    norm_mlp.install(model)
    fused_attention.install(model)
    if not full:
        model = adapters.add_adapter(model, r=8, alpha=16, dropout=settings.pop("dropout", 0.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    watch = Watch()
    run = quiet_run(folder, steps, **{"lr": 3e-3, "max_norm": 1.0, **settings})
    half = dtype == torch.float16
    strategy = Strategy(run.settings, Processes("cpu"))
    run.is_main = strategy.processes.is_main
    strategy.prepare(
        PackedCausalLM(model, autocast=dtype if full and half else None),
        lambda prepared: torch.optim.AdamW(trained, lr=1e-3),
    )
    trainer = Trainer(
        strategy=strategy,
        algorithm=algorithm or Algorithm(),
        loader=FixedGroups(groups or [[samples(4)], [samples(4, seed=1)]]),
        run=run,
        hooks=[watch],
        save=lambda run: None,
        loss_scaler=LossScaler(scale=scale or INITIAL_SCALE) if half else None,
    )
    return trainer, watch.seen


def weights(trainer):
    return [p.detach().clone() for p in trainer.strategy.parameters]


GROUPINGS = {
    "one micro-batch": [[samples(2)], [samples(2, seed=1)]],
    "three": [[samples(1), samples(2, seed=1), samples(1, seed=2)]],
}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_fifty_steps_follow_those_of_float32(tmp_path, grouping, full):
    groups, steps = GROUPINGS[grouping], 20 if full else 50
    losses = []
    for dtype in (torch.float16, torch.float32):
        trainer, seen = make_trainer(tmp_path, dtype, steps=steps, groups=groups, full=full)
        trainer.fit()
        losses.append([numbers["loss"] for numbers in seen])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[1][-1] < 0.8 * losses[1][0]  # otherwise it would be easy to follow


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradients_are_those_of_float32(tmp_path, full):
    """The error is that of float16's rounding, 2^-11, through two layers and back."""
    found = []
    for dtype in (torch.float16, torch.float32):
        trainer, _ = make_trainer(tmp_path, dtype, steps=1, full=full, max_norm=None)
        if not full:  # B starts at zero, and A without a gradient
            for index, parameter in enumerate(trainer.strategy.parameters):
                generator = torch.Generator().manual_seed(index)
                parameter.data.normal_(std=0.1, generator=generator)
        group = next(trainer.loader.groups(0, 1))
        divisor = float(sum(b.num_supervised for b in group))
        trainer.gradients.compute(group, divisor=divisor, step=0)
        found.append([p.grad.double().flatten() for p in trainer.strategy.parameters])
    for ours, exact in zip(*found, strict=True):
        assert torch.cosine_similarity(ours, exact, dim=0) > 0.9999
        assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_overflow_loses_no_step(tmp_path, dropout):
    """A scale that is far too high is lowered in the first step, and the run is bitwise equal to
    one with the right scale from the start, random numbers included."""
    groups = GROUPINGS["three"]
    high, seen = make_trainer(
        tmp_path, torch.float16, steps=3, groups=groups, scale=2.0**40, dropout=dropout
    )
    high.fit()
    right = seen[0]["loss_scale"]
    assert 1 < right < 2.0**40
    low, wanted = make_trainer(
        tmp_path, torch.float16, steps=3, groups=groups, scale=right, dropout=dropout
    )
    low.fit()
    for name in ("loss", "grad_norm", "loss_scale"):
        assert [n[name] for n in seen] == [n[name] for n in wanted]
    assert all(map(torch.equal, weights(high), weights(low)))


def test_half_the_scale_gives_nearly_the_same_gradients(tmp_path):
    """A power of two only changes numbers below 6e-5, which have fewer bits in float16."""
    found = []
    for scale in (2.0**12, 2.0**11):
        trainer, _ = make_trainer(tmp_path, torch.float16, steps=1, scale=scale)
        trainer.fit()
        found.append(weights(trainer))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_a_loss_that_is_not_finite_is_a_fault_and_no_overflow(tmp_path):
    calls = []

    class Exploding(Algorithm):
        def loss(self, model, batch):
            calls.append(batch)
            output = super().loss(model, batch)
            return type(output)(output.loss * (math.nan if 2 in lines(batch) else 1.0))

    def lines(batch):
        return {row.line for row in batch.rows}

    trainer, _ = make_trainer(tmp_path, torch.float16, steps=2, algorithm=Exploding())
    with pytest.raises(TrainingError, match=r"(?s)line 2\..*float16 overflows above 65,504"):
        trainer.fit()
    assert len(calls) == 1 + 4  # the step was not repeated; each row was tried separately
    assert trainer.loss_scaler.scale == INITIAL_SCALE


def test_gradients_that_overflow_at_every_scale_are_an_error(tmp_path):
    trainer, _ = make_trainer(tmp_path, torch.float16, steps=2, scale=8.0)
    trainer.strategy.parameters[0].register_hook(lambda grad: grad * math.nan)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="overflow float16"):
        trainer.fit()
    assert all(map(torch.equal, weights(trainer), before))
    assert trainer.loss_scaler.state_dict() == {"scale": 8, "good_steps": 0}


def test_interruption_during_a_repeated_step_changes_nothing(tmp_path):
    trainer, _ = make_trainer(tmp_path, torch.float16, steps=2, scale=2.0**40)
    accumulate, calls = trainer.gradients._accumulate, []

    def stop_at_the_third(*arguments):
        calls.append(True)
        if len(calls) == 3:
            raise Interrupted
        return accumulate(*arguments)

    trainer.gradients._accumulate = stop_at_the_third
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.loss_scaler.state_dict() == {"scale": 2.0**40, "good_steps": 0}


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    """The scale is doubled, and an overflow follows."""
    monkeypatch.setattr(loss_scaler, "GROWTH_STEPS", 3)

    def run(steps, source=None, scale=None):
        trainer, seen = make_trainer(
            tmp_path, torch.float16, steps=steps, scale=scale, dropout=0.2, max_norm=None
        )
        if source:
            trainer.run.step, _ = load_state(
                source,
                load_optimizer=trainer.strategy.load_optimizer_state,
                loss_scaler=trainer.loss_scaler,
                identity={},
            )
            for parameter, saved in zip(
                trainer.strategy.parameters, torch.load(source / "weights.pt"), strict=True
            ):
                parameter.data.copy_(saved)
        trainer.fit()
        return trainer, seen

    straight, seen = run(10, scale=2.0**20)
    assert len({numbers["loss_scale"] for numbers in seen}) > 1
    stopped, before = run(4, scale=2.0**20)
    save_state(
        tmp_path,
        step=4,
        optimizer=stopped.strategy.optimizer_state(),
        identity={},
        loss_scaler=stopped.loss_scaler,
    )
    torch.save(weights(stopped), tmp_path / "weights.pt")
    resumed, after = run(10, source=tmp_path)
    for name in ("loss", "grad_norm", "loss_scale"):
        assert [n[name] for n in seen] == [n[name] for n in (*before, *after)]
    assert all(map(torch.equal, weights(straight), weights(resumed)))
    assert resumed.loss_scaler.state_dict() == straight.loss_scaler.state_dict()


def test_changed_dtype_is_reported():
    chosen = Settings(pretrained_model_name_or_path="m", data_path="d")
    found = [identity_of(chosen, "data", processes=1, dtype=d)["dtype"] for d in ("float16", "x")]
    assert found == ["float16", "x"]


def one_of_two_overflows(folder):
    """In a separate process: only the second process's gradients overflow, twice."""
    trainer, seen = make_trainer(folder, torch.float16, steps=2, scale=16.0)
    if trainer.processes.rank == 1:
        left = [math.inf, math.inf]
        trainer.strategy.parameters[0].register_hook(
            lambda grad: grad * (left.pop() if left else 1.0)
        )
    trainer.fit()
    scales = trainer.processes.gather([str(n["loss_scale"]) for n in seen])  # on the first process
    return scales, [p.double().sum().item() for p in weights(trainer)]


@pytest.mark.distributed
def test_all_processes_lower_the_scale_together(tmp_path):
    first, second = run_distributed(one_of_two_overflows, tmp_path, processes=2)
    assert first == second
    assert first[0] == ["4.0", "4.0"]
