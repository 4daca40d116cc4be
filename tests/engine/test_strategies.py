"""The contract of strategies, and a user's own."""

import copy
import gc
import importlib
import importlib.util
import inspect
import weakref
from types import SimpleNamespace

import pytest
import sharded_cases
import torch
from recording_strategy import Recording
from trainer_parts import make_samples, make_trainer

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.engine import strategies
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.errors import ConfigError, LaunchError
from xtuner.parallel.processes import Processes

PACKAGE = "xtuner.engine.strategies"
ALONE = Processes("cpu")


def settings(**chosen):
    return Settings(pretrained_model_name_or_path="m", data_path="d", **chosen)


def weights_of(strategy):
    return {name: weight.clone() for name, weight in strategy.trained_weights()}


@pytest.mark.parametrize("name", plugins.names(PACKAGE))
def test_every_file_is_a_strategy_that_returns_what_it_took(name):
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert issubclass(module.Strategy, BaseStrategy) and not inspect.isabstract(module.Strategy)
    assert module.__doc__

    def prepared(weights=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        model.bias.requires_grad_(False)
        model.load_state_dict(weights or {}, strict=False)
        strategy = module.Strategy(settings(), ALONE)
        strategy.prepare(model, lambda m: torch.optim.AdamW([m.weight]))
        return strategy

    def step(strategy, number):
        strategy.zero_grad()
        strategy.backward((strategy.model(torch.ones(1, 3) * number) ** 2).sum(), last=True)
        strategy.reduce_gradients()
        strategy.unscale(0.5)
        norm = strategy.clip_gradients(1e-3)
        strategy.set_learning_rate(0.1 * number)
        strategy.step()
        return norm

    straight = prepared()
    assert step(straight, 1) > 1e-3  # the norm is that before clipping
    assert weights_of(straight).keys() == {"weight"}
    resumed = prepared(weights_of(straight))
    state = straight.optimizer_state()
    assert list(state["state"]) == [0] and state["param_groups"][0]["lr"] == 0.1
    resumed.load_optimizer_state(copy.deepcopy(state))  # torch takes tensors as they are
    for strategy in (straight, resumed):
        step(strategy, 2)
    assert torch.equal(weights_of(straight)["weight"], weights_of(resumed)["weight"])
    before = weights_of(straight)["weight"]
    straight.zero_grad()
    straight.backward(torch.ones(()), last=True)  # of nothing that is trained
    straight.step()
    assert torch.equal(weights_of(straight)["weight"], before)


def test_a_users_strategy_is_loaded_and_anything_else_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from xtuner.engine.strategies.replicated import Strategy\n"
        "class Mine(Strategy):\n"
        "    @classmethod\n"
        "    def check(cls, settings):\n"
        "        if settings.max_norm is None:\n"
        "            yield 'max_norm', 'must be set'\n"
        "class Other: ...\n",
        encoding="utf-8",
    )
    made = strategies.of_run(settings(strategy="mine.py:Mine"), ALONE, folder=tmp_path)
    assert type(made).__name__ == "Mine" and isinstance(made, BaseStrategy)
    with pytest.raises(ConfigError, match="max_norm: must be set"):
        strategies.of_run(settings(strategy="mine.py:Mine", max_norm=None), ALONE, folder=tmp_path)
    with pytest.raises(ConfigError, match="not a subclass"):
        strategies.of_run(settings(strategy="mine.py:Other"), ALONE, folder=tmp_path)
    with pytest.raises(ConfigError, match="replicated"):
        strategies.of_run(settings(strategy="replicate"), ALONE, folder=tmp_path)


def test_the_trainer_goes_through_the_strategy_alone(tmp_path):
    groups = [[make_samples(2), make_samples(1, seed=1)]]
    trainer = make_trainer(tmp_path, groups, steps=2, kind=Recording)
    trainer.fit()
    step = ["set_learning_rate", "zero_grad", "backward", "backward", "reduce_gradients",
            "clip_gradients", "step"]  # fmt: skip
    assert trainer.strategy.calls == ["prepare", *step, *step]


class WithImages(torch.nn.Module):
    """One weight for text, and one for images."""

    always_embeds = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.image = (torch.nn.Linear(3, 1, bias=False) for _ in range(2))
        self.embedder = SimpleNamespace(weights=self.image.parameters)
        self.saw_images = False

    def forward(self, x, *, images):
        self.saw_images |= images
        return self.text(x) + self.image(x * images)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in plugins.names(PACKAGE)
        if importlib.import_module(f"{PACKAGE}.{n}").Strategy.gathers
    ],
)
def test_a_step_without_images_leaves_their_weights_and_state_alone(name):
    def prepared(weights=None):
        model = WithImages()
        model.load_state_dict(weights or {}, strict=False)
        kind = importlib.import_module(f"{PACKAGE}.{name}").Strategy
        strategy = kind(settings(), ALONE)
        strategy.prepare(model, lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1))
        return strategy

    def step(strategy, *, images):
        strategy.zero_grad()
        loss = strategy.model(torch.ones(1, 3), images=images).sum()
        strategy.backward(loss, last=True)
        strategy.reduce_gradients()
        strategy.clip_gradients(None)
        strategy.set_learning_rate(0.1)
        strategy.step()
        return weights_of(strategy)

    straight = prepared()
    first, second = step(straight, images=True), step(straight, images=False)
    assert torch.equal(first["image.weight"], second["image.weight"])
    assert not torch.equal(first["text.weight"], second["text.weight"])
    state = straight.optimizer_state()
    assert [int(state["state"][number]["step"]) for number in (0, 1)] == [2, 1]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1]]
    resumed = prepared(second)
    resumed.load_optimizer_state(copy.deepcopy(state))
    third = step(straight, images=True)
    for weight, found in step(resumed, images=True).items():
        assert torch.equal(found, third[weight])
        assert not torch.equal(found, second[weight])
    only_text = prepared()
    step(only_text, images=False)
    state = only_text.optimizer_state()
    assert list(state["state"]) == [0]  # as on one process, images have no state yet
    prepared().load_optimizer_state(copy.deepcopy(state))


def test_adagrad_is_refused_where_its_weight_decay_would_be_lost():
    for name in ("deepspeed_zero1", "deepspeed_zero3"):
        kind = importlib.import_module(f"{PACKAGE}.{name}").Strategy
        assert [found for found, _ in kind.check(settings(optim_type="Adagrad"))] == ["optim_type"]
        assert not list(kind.check(settings(optim_type="SGD")))


def test_what_cannot_work_is_refused_with_what_does(monkeypatch, tmp_path):
    def told(strategy, **chosen):
        with pytest.raises(ConfigError) as caught:
            strategies.of_run(settings(strategy=strategy, **chosen), ALONE, folder=tmp_path)
        return str(caught.value)

    assert "set strategy = 'deepspeed_zero2'" in told("fsdp2", tuning="qlora")
    int8 = {"tuning": "qlora", "quantization": "int8"}
    assert "set quantization = 'nf4'" in told("deepspeed_zero3", **int8)
    assert "set 'AdamW'" in told("fsdp2", optim_type="PagedAdamW8bit")
    strategies.of_run(settings(strategy="deepspeed_zero2", **int8), ALONE, folder=tmp_path)
    find = importlib.util.find_spec
    missing = lambda name: None if name == "deepspeed" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert "strategy: needs DeepSpeed: pip install 'xtuner[deepspeed]'" in told("deepspeed_zero1")


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2"])
def test_an_engine_that_does_not_shard_is_an_error(name, monkeypatch):
    if name == "fsdp2":
        monkeypatch.setattr("torch.distributed.fsdp.fully_shard", keeps_weights_whole)
    else:
        engine = importlib.import_module("deepspeed")
        monkeypatch.setattr(engine, "initialize", without_zero(engine.initialize))
    with pytest.raises(LaunchError, match=f"strategy = '{name}' is not active: .* 'replicated'"):
        sharded_cases.make_trainer(ALONE, name, "full")


def keeps_weights_whole(module, **options):
    for method in (
        "set_gradient_divide_factor",
        "set_force_sum_reduction_for_comms",
        "set_reduce_scatter_unused_params",
    ):
        setattr(module, method, lambda value: None)


def without_zero(initialize):
    """DeepSpeed's `initialize`, which ignores what is to be sharded."""

    def ignoring(*, config, **options):
        return initialize(config={**config, "zero_optimization": {"stage": 0}}, **options)

    return ignoring


@pytest.mark.parametrize("quantization", ["nf4", ""], ids=["qlora", "lora"])
def test_weights_are_there_in_the_backward_pass_of_fused_layers(quantization, tmp_path):
    """An answer before training calls other modules; fused layers read weights without a call."""
    zero3 = sharded_cases.frees_at_once(tmp_path)
    for recompute in (False, True):
        wanted, kept = sharded_cases.fused_case(
            ALONE, "replicated", tmp_path, quantization, recompute=recompute
        )
        found, freed = sharded_cases.fused_case(
            ALONE, zero3, tmp_path, quantization, recompute=recompute
        )
        assert found == wanted
        assert kept > 0 and freed == 0


@pytest.mark.parametrize("name", [n for n in plugins.names(PACKAGE) if "offload" not in n])
def test_nothing_keeps_the_model_after_a_run(name):
    def run():
        model = sharded_cases.model_of("full")
        trainer = sharded_cases.make_trainer(ALONE, name, "full", model=model)
        trainer.fit()
        trainer.strategy.close()
        return [weakref.ref(model), *map(weakref.ref, model.parameters())]

    held = [*run(), *run()]
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
