"""Optimizers by name and the learning rate of each step."""

import copy

import pytest
import torch
from torch import nn

from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.optim import (
    clip_gradients,
    learning_rate,
    load_optimizer,
    make_optimizer,
)
from xtuner.engine.optimizer.state_check import check_state
from xtuner.errors import ConfigError
from xtuner.testing.tiny import tiny_model


def rates(schedule, steps=100, warmup=0.1):
    options = {"total_steps": steps, "peak": 1.0, "warmup_ratio": warmup, "schedule": schedule}
    return [learning_rate(step, **options) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_it_rises_then_follows_the_schedule(schedule):
    values = rates(schedule)
    assert values[0] > 0 and values[:10] == sorted(values[:10]) and values[10] == 1.0
    after = values[10:]
    assert after == sorted(after, reverse=True)
    assert after[-1] == 1.0 if schedule == "constant" else after[-1] < 0.02
    middle = values[10 + 45]
    assert middle == {"cosine": pytest.approx(0.5), "linear": 0.5, "constant": 1.0}[schedule]


def test_cosine_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for value in rates("cosine", warmup=0.0):
        assert value == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def make(name, **options):
    model = torch.nn.Linear(4, 4)
    chosen = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, **options}
    return make_optimizer(name, model, **chosen)


def test_biases_are_not_decayed_and_betas_arrive():
    optimizer = make("AdamW")
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {2: 0.3, 1: 0.0}
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)


def test_an_optimizer_without_betas_is_made():
    assert isinstance(make("SGD"), torch.optim.SGD)


def test_a_paged_optimizer_steps_on_a_cpu_as_its_unpaged_kind():
    assert type(make("PagedAdamW8bit", paged=False)).__name__ == "AdamW8bit"


def test_a_wrong_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'AdamW'"):
        make("AdmW")


class PagedLike:
    """Handles state like bitsandbytes' paged optimizers, without a GPU."""

    is_paged = True

    def __init__(self, parameters):
        self.parameters, self.state = parameters, {}

    def load_state_dict(self, state, move_to_device=True):
        assert not move_to_device  # it would not fit all at once
        for parameter, values in zip(self.parameters, state["state"].values(), strict=True):
            self.state[parameter] = dict(values)

    def get_state_buffer(self, parameter, dtype):
        buffer = torch.zeros(parameter.shape, dtype=dtype)
        if parameter.numel() >= 1e5:
            buffer.is_paged = True
        return buffer


def test_loaded_state_is_paged_again(monkeypatch):
    synchronised = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronised.append(True))
    large, small = (torch.empty(n, 500, device="meta") for n in (300, 3))
    state = {
        i: {
            "step": 7,
            "state1": torch.rand(n, 500),
            "state2": torch.ones(n, 500, dtype=torch.uint8),
        }
        for i, n in enumerate((300, 3))
    }
    optimizer = PagedLike([large, small])
    load_optimizer(optimizer, {"state": state})
    assert synchronised == [True]
    for name in ("state1", "state2"):
        assert optimizer.state[large][name].is_paged
        assert torch.equal(optimizer.state[large][name], state[0][name])
        assert optimizer.state[small][name] is state[1][name]
    assert optimizer.state[large]["step"] == 7


def test_gradients_are_clipped_as_torch_does_and_left_alone_below_the_limit():
    def parameters():
        generator = torch.Generator().manual_seed(4)
        made = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 7)]
        for p in made[:2]:  # the third has no gradient
            p.grad = torch.randn(p.shape, generator=generator)
        return made

    for limit in (0.5, 1e6, None):
        ours, theirs = parameters(), parameters()
        norm = clip_gradients(ours, limit)
        expected = nn.utils.clip_grad_norm_(theirs, float("inf") if limit is None else limit)
        assert norm == expected.item()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))


def test_muon_takes_matrices_and_adamw_the_rest_and_resumes_exactly():
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            ids = torch.randint(5, 200, (1, 12))
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optim.set_learning_rate(optimizer, 1e-3 * (step + 1))
            optimizer.step()

    def made(model):
        return optim.make_optimizer("Muon", model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    straight = tiny_model()
    optimizer = made(straight)
    names = {id(p): name for name, p in straight.named_parameters()}
    muon, *rest = optimizer.param_groups
    assert all("proj" in names[id(p)] for p in muon["params"])
    others = {names[id(p)] for group in rest for p in group["params"]}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others
    steps(straight, optimizer, 0, 2)
    resumed = tiny_model()
    resumed.load_state_dict(straight.state_dict())
    other = made(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check_state(other, optimizer.state_dict())
    steps(straight, optimizer, 2, 4)
    steps(resumed, other, 2, 4)
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
