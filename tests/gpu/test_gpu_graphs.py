"""The decoder as CUDA graphs on a GPU, against the plain passes."""

import itertools

import pytest
import torch

from xtuner.config.schema import Settings
from xtuner.kernels.cuda_graphs import CudaRecorder
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.graphs.decoder import GraphedDecoder
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.testing.tiny import tiny_model_folder
from xtuner.types import IGNORE_INDEX, Batch

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "initializer_range": 0.05,
}
CASES = {
    "LoRA": {"tuning": "lora"},
    "LoRA, recomputed": {"tuning": "lora", "gradient_checkpointing": True},
    "LoRA, dropout": {"tuning": "lora", "lora_dropout": 0.1},
    "QLoRA": {"tuning": "qlora"},
    "QLoRA, recomputed": {"tuning": "qlora", "gradient_checkpointing": True},
    "all weights": {"tuning": "full"},
    "all weights, recomputed": {"tuning": "full", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("graphs") / "model"
    tiny_model_folder(path, "llama", **SIZES)
    return path


def batch_of(lengths, seed):
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(5, 500, (1, total), generator=draw)
    labels = ids.masked_fill(torch.rand(1, total, generator=draw) > 0.6, IGNORE_INDEX)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    labels[0, ends[:-1].long()] = IGNORE_INDEX
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, labels, positions, ends)


BATCHES = [
    batch_of((60, 100, 30, 1, 50), 0),
    batch_of((20, 120, 111), 1),
    batch_of((7,) * 30 + (40,), 2),
    batch_of((250,), 3),
]


def model_of(folder, changes, dtype):
    s = Settings(
        pretrained_model_name_or_path=str(folder),
        data_path="none.json",
        **{"lora_r": 8, "lora_dropout": 0.0, **changes},
    )
    recompute = s.gradient_checkpointing is True
    torch.manual_seed(0)
    llm = make_trainable(s, dtype=dtype, device="cuda", recompute=recompute)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    model = PackedCausalLM(llm, autocast=llm_autocast(s, dtype))
    model.train()
    return model


def graphed(model, said):
    model.graphs = GraphedDecoder(
        model.decoder,
        module=model.causal,
        parameters=model.decoder_parameters,
        gradients=lambda parameters: [torch.zeros_like(p) for p in parameters],
        recorder=CudaRecorder,
        autocast=lambda: torch.autocast(
            "cuda", dtype=model.autocast, enabled=model.autocast is not None, cache_enabled=False
        ),
        report=said.append,
    )
    return model


def steps_of(model):
    """Losses and gradients of three steps of two to four micro-batches."""
    found = []
    for step in ((0, 1), (0, 1, 2, 3), (2, 3)):
        model.zero_grad(set_to_none=True)
        losses = []
        for index in step:
            torch.manual_seed(index)
            loss = -model(BATCHES[index].to("cuda")).sum()
            loss.backward()
            losses.append(float(loss.detach()))
        grads = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses, grads))
    return found


def apart(found, wanted):
    """Relative difference of losses, and of all gradients together."""
    pairs = list(zip(found, wanted, strict=True))
    losses = max(abs(a - b) / abs(b) for (x, _), (y, _) in pairs for a, b in zip(x, y, strict=True))
    difference = sum(float((x[n] - y[n]).square().sum()) for (_, x), (_, y) in pairs for n in y)
    size = sum(float(g.square().sum()) for _, (_, y) in pairs for g in y.values())
    assert all(x.keys() == y.keys() for (_, x), (_, y) in pairs)
    return losses, (difference / size) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_gives_the_losses_and_gradients_of_the_plain_pass(card, folder, half, case, fake_cuda):
    if fake_cuda is not None:
        pytest.skip("the fake device has no graphs")
    said = []
    model = graphed(model_of(folder, CASES[case], half), said)
    found = steps_of(model)
    assert not said, said
    assert model.graphs.replays >= 4
    model.graphs = None
    wanted, again = steps_of(model), steps_of(model)
    losses, gradients = apart(found, wanted)
    noise = apart(again, wanted)
    print(f"{case}: losses {losses:.2g}, gradients {gradients:.2g}; two plain runs {noise}")
    # rows are padded to another size, for which other matmul kernels may be chosen
    assert losses <= 1e-3 and gradients <= max(4 * noise[1], 0.01)
