"""Processes that share the tokens of a row give the losses and gradients of one process.

Four are started once for all cases: two data groups of two, and one group of four.
"""

import functools

import numpy as np
import pytest
import torch
from trainer_parts import make_samples, make_trainer

from xtuner.algorithms.sft import Algorithm
from xtuner.engine.hooks.base import BaseHook
from xtuner.errors import DataError
from xtuner.kernels.attention import packed as attention
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.neftune import EmbeddingNoise
from xtuner.parallel.processes import Processes
from xtuner.parallel.ulysses import share_heads
from xtuner.testing.run_distributed import run_distributed
from xtuner.testing.tiny import tiny_model
from xtuner.training.evaluate import Validation

pytestmark = pytest.mark.distributed

CASES = {
    "grouped": ("llama", {}),
    "fewer_kv_heads": ("llama", {"num_key_value_heads": 1}),
    "uneven_heads": ("qwen3", {"num_attention_heads": 9, "num_key_value_heads": 3}),
    "window": ("mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
    "softcap_and_windows": ("gemma2", {"sliding_window": 4}),
    "experts": ("mixtral", {"num_local_experts": 4}),
    "dynamic_rotation": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "lora": ("llama", {}),
    "recomputed": ("llama", {}),
}
FEW = ("uneven_heads", "window", "dynamic_rotation", "lora")
"""Cases that are no slow tests."""


def model_of(case):
    kind, config = CASES[case]
    model = tiny_model(kind, **config).double()
    model.set_attn_implementation(attention.register())
    if case == "experts":  # the default does not support float64
        model.set_experts_implementation("eager")
    if case == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case == "lora":
        model = adapters.add_adapter(
            model, r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], seed=0
        ).double()
        with torch.no_grad():  # so that every adapter has a gradient
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.sin(torch.arange(weight.numel()).view_as(weight) * 1.7))
    return PackedCausalLM(model).train()


def rows():
    """Two rows: seven samples, and a sample whose loss is in its first tokens, so that only the
    first process of its group has any."""
    (short,) = make_samples(1, seed=3)
    short.loss_mask[:] = False
    short.loss_mask[1] = True
    return [make_samples(7), [short]]


def losses_and_gradients(processes, case):
    """Losses and gradients of the rows, distributed over the data groups."""
    model = model_of(case)
    if processes.sequence is not None:
        model.split_rows(processes.sequence)
    losses = []
    for samples in rows()[processes.data_rank :: processes.data_world_size]:
        loss = Algorithm().loss(model, Algorithm().collate(samples)).loss
        loss.backward()
        losses.append(loss.item())
    (loss,) = processes.sum(processes.of_rows([sum(losses)]))
    processes.sum_gradients(model.parameters())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, {name: grad.numpy() for name, grad in gradients.items()}


def two_steps(folder, processes, case):
    """Losses, gradient norms and weights of two clipped steps."""
    group = [make_samples(n, seed=n) for n in (3, 1, 2)]  # the second data group has one less
    mine = group[processes.data_rank :: processes.data_world_size]
    model = model_of(case).model
    trainer = make_trainer(
        folder, [mine], steps=2, model=model, max_norm=0.5, lr=0.1, processes=processes
    )
    scalars = []
    trainer.hooks.hooks.append(Note(scalars))
    trainer.fit()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    return scalars, weights.numpy()


class Note(BaseHook):
    """Records what does not depend on the number of processes."""

    collective = True

    def __init__(self, scalars):
        self.scalars = scalars

    def on_step(self, run):
        names = ("loss", "grad_norm", "supervised_tokens")
        self.scalars.append([run.scalars[name] for name in names])


def validation(folder, processes):
    """The loss on three rows, and the error for a row that only the last process cannot read."""
    trainer = make_trainer(folder, [[]], processes=processes)
    split = [make_samples(2, seed=seed) for seed in range(3)]

    def collate(pack):
        if unreadable and processes.rank == 3:
            raise DataError("rows.jsonl line 1: damaged")
        return Algorithm().collate(pack)

    unreadable = False
    measure = Validation(trainer.strategy, split, Algorithm(), collate).measure
    loss = measure()
    unreadable = True
    if processes.world_size == 1:
        return loss, ""
    with pytest.raises(DataError) as caught:
        measure()
    return loss, str(caught.value)


def gradients_of(cases):
    two = Processes("cpu", sequence_parallel_size=2)
    found = {(case, 2): losses_and_gradients(two, case) for case in cases}
    two.close()
    return found


def everything(folder):
    four = Processes("cpu", sequence_parallel_size=4)
    found = {("lora", 4): losses_and_gradients(four, "lora")}
    two = Processes("cpu", sequence_parallel_size=2)
    found |= {(case, 2): losses_and_gradients(two, case) for case in FEW}
    found["lora"] = two_steps(folder, two, "lora")
    found["validation"] = validation(folder, two)
    two.close()
    return found


@pytest.fixture(scope="module")
def alone():
    return functools.cache(functools.partial(losses_and_gradients, Processes("cpu")))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_distributed(everything, tmp_path_factory.mktemp("four"), processes=4)


@pytest.mark.parametrize(("case", "size"), [*((case, 2) for case in FEW), ("lora", 4)])
def test_losses_and_gradients_are_those_of_one_process(case, size, alone, four):
    compare(case, [result[case, size] for result in four], alone(case))


@pytest.mark.slow
def test_more_architectures(alone):
    others = [case for case in CASES if case not in FEW]
    two = run_distributed(gradients_of, others)
    for case in others:
        compare(case, [result[case, 2] for result in two], alone(case))


def compare(case, every_process, expected):
    loss, gradients = expected
    # transformers always computes Gemma's norms in float32
    limit = 1e-6 if case == "softcap_and_windows" else 1e-12
    for found_loss, found in every_process:
        assert found_loss == pytest.approx(loss, rel=limit)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            off = np.linalg.norm(found[name] - gradient)
            assert off < limit * np.linalg.norm(gradient), name


def test_clipped_steps_are_those_of_one_process(four, tmp_path):
    scalars, weights = two_steps(tmp_path, Processes("cpu"), "lora")
    assert scalars[0][1] > 0.5  # it is clipped
    for found_scalars, found in (result["lora"] for result in four):
        assert found_scalars == [pytest.approx(step, rel=1e-9) for step in scalars]
        assert np.abs(found - weights).max() < 1e-9


def test_validation_is_that_of_one_process_and_stops_together(four, tmp_path):
    loss, _ = validation(tmp_path, Processes("cpu"))
    for found, told in (result["validation"] for result in four):
        assert found == pytest.approx(loss, rel=1e-6)
        assert told == "rows.jsonl line 1: damaged"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 8, 2), (8, 2, 4), (9, 3, 2), (7, 1, 3)]
)
def test_every_head_is_computed_once_with_the_keys_that_it_reads(heads, kv_heads, size):
    shares = share_heads(heads, kv_heads, size)
    assert [head for share in shares for head in share.queries] == list(range(heads))
    for share in shares:
        each = len(share.queries) // len(share.keys)
        local = share.repeat or [i // each for i in range(len(share.queries))]
        reads = [share.keys[i] for i in local]
        assert reads == [head * kv_heads // heads for head in share.queries]
    with pytest.raises(ValueError, match="heads"):
        share_heads(heads, kv_heads, heads + 1)


def test_noise_on_a_part_of_a_row_is_as_large_as_on_the_row():
    embedding = torch.nn.Embedding(4, 64).requires_grad_(False)
    embedding.weight.zero_()
    noise = EmbeddingNoise(embedding, alpha=5.0)
    ends = torch.tensor([0, 4, 20], dtype=torch.int32)
    with noise.of_row(ends, slice(2, 12)):
        added = embedding(torch.zeros(1, 10, dtype=torch.int64))[0].abs().amax(1)
    bounds = 5.0 / (torch.tensor([4.0] * 2 + [16.0] * 8) * 64).sqrt()
    assert (added <= bounds).all() and (added > 0.8 * bounds).all()
