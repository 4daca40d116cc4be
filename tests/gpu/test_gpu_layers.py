"""The loss, fused layers, LoRA, quantized products and Liger kernels on a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtuner.kernels.cross_entropy import log_probabilities
from xtuner.kernels.four_bit import dequantized
from xtuner.kernels.fused import liger, norm_mlp
from xtuner.kernels.host_embedding import HostEmbedding
from xtuner.kernels.lora.linear import Adapted, lora_linears

pytestmark = pytest.mark.gpu


def random(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def gradients(out, inputs, seed=9):
    grad = random(*out.shape, seed=seed).to(out.device, out.dtype)
    return torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("positions", [1, 3, 200])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_loss(card, half, close, positions, trained):
    hidden, head = random(positions, 64).to(half), random(1000, 64, seed=1, size=0.3).to(half)
    targets = torch.arange(positions) * 37 % 1000
    ours = [hidden.to(card).requires_grad_(), head.to(card).requires_grad_(trained)]
    wide = [hidden.double().requires_grad_(), head.double().requires_grad_(trained)]
    found = -log_probabilities(*ours, targets.to(card)).sum()
    wanted = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    close(found, wanted)
    needed = 2 if trained else 1
    pairs = zip(
        torch.autograd.grad(found, ours[:needed]),
        torch.autograd.grad(wanted, wide[:needed]),
        strict=True,
    )
    for a, b in pairs:
        close(a, b, 6)


@pytest.mark.parametrize("width", [64, 2048, 4096])
def test_norm(card, half, close, width):
    x, weight = random(1, 9, width, size=3).to(half), (random(width, seed=1) * 0.1 + 1).to(half)
    ours = x.to(card).requires_grad_()
    layer = norm_mlp.RMSNorm(nn.Parameter(weight.to(card), requires_grad=False), 1e-5)
    wide = x.double().requires_grad_()
    out = layer(ours)
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    close(out, wanted)
    close(gradients(out, [ours])[0], gradients(wanted, [wide])[0])


def test_gated_mlp(card, half, close):
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=False) for sizes in ((64, 160), (64, 160), (160, 64))]
    layers = [layer.to(half) for layer in layers]
    x = random(1, 33, 64).to(half)
    wide = [layer.weight.detach().double() for layer in layers]
    exact = x.double().requires_grad_()
    wanted = (F.silu(exact @ wide[0].T) * (exact @ wide[1].T)) @ wide[2].T
    ours = x.to(card).requires_grad_()
    out = norm_mlp.GatedMLP(*(layer.to(card) for layer in layers))(ours)
    close(out, wanted, 6)
    close(gradients(out, [ours])[0], gradients(wanted, [exact])[0], 8)


@pytest.mark.parametrize("held", ["plain", "nf4"])
def test_lora_layers_of_one_input(card, half, close, held):
    import bitsandbytes as bnb

    sizes = {"q": 64, "k": 32, "v": 32}
    parts, plain = [], []
    for seed, out in enumerate(sizes.values()):
        weight = random(out, 128, seed=seed, size=0.1).to(half)
        if held == "nf4":
            layer = bnb.nn.Linear4bit(128, out, bias=False, compute_dtype=half, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            layer = layer.to(card)
            read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            exact = read.double().cpu()
        else:
            layer = nn.Linear(128, out, bias=False).to(card, half)
            layer.weight.data.copy_(weight)
            layer.requires_grad_(False)
            exact = weight.double()
        down, up = random(8, 128, seed=seed + 10, size=0.1), random(out, 8, seed=seed + 20)
        adapters = [a.to(card).requires_grad_() for a in (down, up)]
        parts.append(Adapted(layer, *adapters, scaling=0.5))
        plain.append((exact, *(a.double().requires_grad_() for a in (down, up))))
    x = random(1, 21, 128).to(half)
    ours, wide = x.to(card).requires_grad_(), x.double().requires_grad_()
    out = torch.cat(lora_linears(ours, parts), -1)
    wanted = torch.cat([wide @ w.T + 0.5 * (wide @ a.T) @ b.T for w, a, b in plain], -1)
    close(out, wanted)
    found = gradients(out, [ours, *(t for p in parts for t in (p.down, p.up))])
    right = gradients(wanted, [wide, *(t for _, a, b in plain for t in (a, b))])
    for a, b in zip(found, right, strict=True):
        close(a, b, 6)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_read_as_bitsandbytes_reads_them(card, half, kind, double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for shape in ((64, 128), (17, 192), (3, 64)):
        values = random(*shape, size=0.1).to(card, half)
        packed, state = quantize_4bit(
            values, blocksize=64, compress_statistics=double, quant_type=kind
        )
        read = dequantized(packed, state)
        assert torch.equal(read, dequantize_4bit(packed, state).view(shape))
        assert (read - values).abs().max() < 0.3 * values.abs().max()


def test_embedding_that_stays_on_the_cpu(card):
    rows = random(50, 8)
    embedding = HostEmbedding(rows).to(card)
    ids = torch.tensor([[3, 49, 3]], device=card)
    assert embedding.weight.device.type == "cpu"
    assert torch.equal(embedding(ids).cpu(), rows[ids.cpu()])
    assert embedding(ids).device.type == "cuda"


@pytest.fixture
def kernels(card):
    found = liger.liger_for(torch.empty(1, device=card))
    if found is None:
        pytest.skip(liger.state(card))
    return found


@pytest.mark.parametrize("width", [64, 576, 4096])
def test_norm_of_liger(card, kernels, half, close, width):
    x, weight = random(1, 7, width).to(half), random(width, seed=1).to(half)
    ours, wide = x.to(card).requires_grad_(), x.double().requires_grad_()
    out = kernels.rms_norm(ours, weight.to(card), 1e-5)
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    close(out, wanted)
    close(gradients(out, [ours])[0], gradients(wanted, [wide])[0])


def test_gate_of_liger(card, kernels, half, close):
    pair = [random(1, 5, 11008, seed=s).to(half) for s in (0, 1)]
    ours, wide = ([x.to(card).requires_grad_() for x in pair],
                  [x.double().requires_grad_() for x in pair])  # fmt: skip
    out = kernels.silu_product(ours[0] * 1, ours[1] * 1)
    wanted = F.silu(wide[0]) * wide[1]
    close(out, wanted)
    for a, b in zip(gradients(out, ours), gradients(wanted, wide), strict=True):
        close(a, b)


@pytest.mark.parametrize("width", [64, 80, 128])
def test_rotation_of_liger(card, kernels, half, close, width):
    q, k = random(11, 4, width).to(half), random(11, 2, width, seed=1).to(half)
    angles = (torch.arange(11)[:, None] * 0.3 / (1 + torch.arange(width // 2))).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def turned(x):
        other = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos[:, None].double() + other * sin[:, None].double()

    found = kernels.rotate(q.to(card), k.to(card), cos.to(card), sin.to(card))
    for a, b in zip(found, (q, k), strict=True):
        close(a, turned(b.double()))
