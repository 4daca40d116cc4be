"""Short runs of a tiny model under a strategy, with any distribution of a step's samples."""

import json
import tempfile
from pathlib import Path

import torch
from trainer_parts import make_samples, quiet_run, weighted

from xtuner.algorithms.sft import Algorithm
from xtuner.config.schema import Settings
from xtuner.engine import strategies
from xtuner.engine.optimizer import optim
from xtuner.engine.trainer import Trainer
from xtuner.kernels.attention import packed as attention
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import make_trainable
from xtuner.testing.tiny import tiny_model, tiny_model_folder

STEPS = 3


class Shares:
    """The steps of two ranks, distributed over one rank or two.

    The first step is full, in the second the second half has fewer micro-batches, in the third it
    has none. Half of the samples have loss weights.
    """

    steps_per_epoch = STEPS

    def __init__(self, processes, accumulation):
        sizes = ((accumulation, accumulation), (accumulation, accumulation - 1), (accumulation, 0))
        self._steps = []
        for step, counts in enumerate(sizes):
            halves = [
                [weighted(make_samples(2, seed=100 * step + 10 * half + n)) for n in range(count)]
                for half, count in enumerate(counts)
            ]
            alone = processes.data_world_size == 1
            self._steps.append([*halves[0], *halves[1]] if alone else halves[processes.data_rank])

    def groups(self, start_step, stop_step):
        for step in range(start_step, stop_step):
            yield [Algorithm().collate(part) for part in self._steps[step]]

    def filler(self):
        return Algorithm().collate(make_samples(1, seed=99))


def model_of(tuning, *, tied=False):
    """A tiny model in float32, prepared according to its settings."""
    attention.register()
    model = tiny_model(tie_word_embeddings=tied)
    model.set_attn_implementation(attention.NAME)
    if tuning == "full":
        return PackedCausalLM(model)
    adapted = adapters.add_adapter(model, r=4, alpha=8)
    with torch.no_grad():  # B is zero at first, and A then has no gradient
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return PackedCausalLM(adapted)


def make_trainer(processes, strategy, tuning, accumulation=1, *, model=None, hooks=(), **settings):
    """A trainer of `STEPS` steps with AdamW."""
    folder = Path(tempfile.mkdtemp())
    chosen = {"lr": 0.01, "tuning": tuning, "strategy": strategy, **settings}
    run = quiet_run(folder, STEPS, **chosen)
    s = run.settings
    made = strategies.of_run(s, processes, folder=folder)
    model = model or model_of(tuning)
    if processes.sequence is not None:
        model.split_rows(processes.sequence)
    made.prepare(
        model,
        lambda prepared: optim.make_optimizer(
            "AdamW", prepared, lr=s.lr, betas=s.betas, weight_decay=0.1
        ),
    )
    run.is_main = processes.is_main
    return Trainer(
        strategy=made,
        algorithm=Algorithm(),
        loader=Shares(processes, accumulation),
        run=run,
        hooks=hooks,
        save=lambda run: None,
    )


def case(processes, strategy, tuning, accumulation=1, *, then=lambda strategy: None, **options):
    """Losses, gradient norms and the trained weights of a run; weights on rank 0.

    `then` is called with the strategy at the end.
    """
    trainer = make_trainer(processes, strategy, tuning, accumulation, **options)
    losses, norms = fitted(trainer)
    then(trainer.strategy)
    return losses, norms, weights_of(trainer.strategy)


def frees_at_once(folder):
    """A ZeRO-3 configuration, written to `folder`, that keeps no gathered weight for reuse; also
    writes a model with layers wide enough for fused LoRA and whole blocks of 4-bit weights."""
    tiny_model_folder(folder / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(folder / "zero3.json")


def fused_case(processes, strategy, folder, quantization, *, recompute):
    """Losses and norms of a run with fused LoRA layers in bfloat16, after a forward pass without
    gradients, and the fewest elements of the first layer that were there after the second layer's
    forward pass. The model is that of `frees_at_once`."""
    tuning = {"tuning": "qlora" if quantization else "lora", "lora_r": 8}
    s = Settings(pretrained_model_name_or_path=str(folder / "model"), data_path="d", **tuning)
    adapted = make_trainable(s, dtype=torch.bfloat16, device="cpu", recompute=recompute)
    model = PackedCausalLM(adapted)
    trainer = make_trainer(processes, strategy, "lora", 2, model=model)
    first, second, *_ = model.causal.model.layers
    held = []
    second.register_forward_hook(lambda *_: held.append(sum(p.numel() for p in first.parameters())))
    with torch.no_grad():
        model.eval()
        trainer.strategy.model(Algorithm().collate(make_samples(1)))
    return fitted(trainer), min(held)


def fitted(trainer):
    """Losses and gradient norms of the steps of `trainer`."""
    losses, norms = [], []
    step = trainer._step

    def noted(*arguments):
        step(*arguments)
        losses.append(trainer.run.scalars["loss"])
        norms.append(trainer.run.scalars["grad_norm"])

    trainer._step = noted
    trainer.fit()
    return losses, norms


def weights_of(strategy):
    """Copies of the trained weights by name, as arrays, on rank 0."""
    return {n: t.clone().numpy() for n, t in strategy.trained_weights() if t is not None}
