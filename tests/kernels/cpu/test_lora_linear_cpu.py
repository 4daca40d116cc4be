"""Compiled matrix products and linear layers with LoRA against the formula in float64."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xtuner.kernels.cpu import bindings, build
from xtuner.kernels.lora import linear
from xtuner.kernels.lora.linear import Adapted, lora_linears

pytestmark = [
    pytest.mark.usefixtures("units", "guarded"),
    pytest.mark.skipif(not build.has_products(), reason="no bfloat16 vectors here, or no compiler"),
]


def close(found, exact):
    """As close as rounding twice to 8 bits allows."""
    found, exact = found.double(), exact.double()
    assert found.isfinite().all()
    assert (found - exact).norm() < 0.006 * exact.norm()
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 2), (37, 65, 130), (6, 64, 32), (100, 30, 3200), (73, 100, 3202), (40, 90, 6500),
     (41, 33000, 130)],
    ids="{0[0]}x{0[2]}x{0[1]}".format,
)  # fmt: skip
def test_products_of_any_size(sizes, across):
    rows, columns, inner = sizes
    torch.manual_seed(1)
    a = torch.randn(rows, inner).bfloat16()
    b = torch.randn(*((columns, inner) if across else (inner, columns))).bfloat16()
    guarded = torch.full((rows + 1, columns), torch.nan).bfloat16()
    out = bindings.kernels_for(a, b).product(a, b, guarded[:rows], across=across)
    close(out, a.double() @ (b.T if across else b).double())
    assert guarded[rows].isnan().all()  # nothing is written past the end


def layers_of(width, outs, ranks, *, bias=True, seed=0):
    torch.manual_seed(seed)
    parts = []
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        layer = nn.Linear(width, out, bias=bias and i % 2 == 0).bfloat16().requires_grad_(False)
        # as large as the contribution of the layer, so that an error in either shows
        down = (torch.randn(rank, width) * width**-0.5).requires_grad_()
        up = (torch.randn(out, rank) * rank**-0.5).requires_grad_()
        parts.append(Adapted(layer, down, up, 0.5 * (i + 1)))
    return parts


def formula(x, parts):
    """Outputs, and the inputs x, all A and all B for their gradients."""
    x = x.detach().double().requires_grad_()
    downs = [part.down.detach().double().requires_grad_() for part in parts]
    ups = [part.up.detach().double().requires_grad_() for part in parts]
    outs = []
    for part, down, up in zip(parts, downs, ups, strict=True):
        layer = part.layer
        bias = 0 if layer.bias is None else layer.bias.double()
        outs.append(x @ layer.weight.double().T + bias + part.scaling * (x @ down.T @ up.T))
    return outs, (x, *downs, *ups)


def found_by(x, parts, grad_outputs, *, grad_x=True):
    outs = lora_linears(x, parts)
    assert type(outs[0].grad_fn).__name__ == "_CompiledLoraLinearsBackward"
    trained = [part.down for part in parts] + [part.up for part in parts]
    return [*outs, *torch.autograd.grad(outs, [x] * grad_x + trained, grad_outputs)]


@pytest.mark.parametrize(
    ("tokens", "width", "outs", "ranks"),
    [
        (1, 2, (2,), (2,)),
        (7, 24, (40, 8, 2), (4, 2, 6)),
        (97, 130, (70, 66), (10, 10)),
        (250, 64, (192, 64, 64), (64, 64, 64)),
        (259, 36, (96, 100), (130, 8)),  # more tokens than in one pass
        (43, 3300, (30, 34), (8, 16)),  # inner dimension of several passes
        (13, 40, (4000,), (16,)),
        (40, 896, (4864, 200), (16, 16)),  # more columns than are packed at once
        (70, 3300, (30,), (130,)),  # the adapter needs more scratch memory than the layer
    ],
)
def test_values_and_gradients(tokens, width, outs, ranks):
    parts = layers_of(width, outs, ranks)
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    grad_outputs = [torch.randn(tokens, out).bfloat16() for out in outs]
    exact, inputs = formula(x, parts)
    grads = torch.autograd.grad(
        exact, inputs, [grad_output.double() for grad_output in grad_outputs]
    )
    for found, wanted in zip(found_by(x, parts, grad_outputs), [*exact, *grads], strict=True):
        close(found, wanted)


def test_an_input_without_a_gradient_and_more_dimensions():
    parts = layers_of(24, (40, 8), (4, 2))
    x = torch.randn(2, 3, 24).bfloat16()
    grad_outputs = [torch.randn(2, 3, 40).bfloat16(), torch.randn(2, 3, 16).bfloat16()[..., ::2]]
    exact, inputs = formula(x, parts)
    grads = torch.autograd.grad(
        exact, inputs[1:], [grad_output.double() for grad_output in grad_outputs]
    )
    found = found_by(x, parts, grad_outputs, grad_x=False)
    for ours, wanted in zip(found, [*exact, *grads], strict=True):
        assert ours.shape == wanted.shape
        close(ours, wanted)


def test_an_unused_output():
    parts = layers_of(24, (40, 8), (4, 2))
    x = torch.randn(9, 24).bfloat16().requires_grad_()
    grad_output = torch.randn(9, 40).bfloat16()
    used, _ = linears = lora_linears(x, parts)
    assert len(linears) == 2
    trained = [x, parts[0].down, parts[1].down, parts[1].up]
    found = torch.autograd.grad(used, trained, grad_output)
    exact, inputs = formula(x, parts)
    wanted = torch.autograd.grad(exact[0], [inputs[0], inputs[1]], grad_output.double())
    for ours, plain in zip(found[:2], wanted, strict=True):
        close(ours, plain)
    assert not found[2].any() and not found[3].any()


@pytest.mark.parametrize(
    ("width", "outs"),
    [(398, (11000, 40)), (3300, (70, 3400))],
    ids=["columns in several parts", "inner dimension in several passes, twice"],
)
def test_the_number_of_threads_changes_nothing(width, outs):
    parts = layers_of(width, outs, (10, 6))
    x = torch.randn(300, width).bfloat16().requires_grad_()
    grad_outputs = [torch.randn(300, out).bfloat16() for out in outs]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(found_by(x, parts, grad_outputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays_in_its_row():
    parts = layers_of(64, (64,), (8,))
    x = torch.randn(45, 64).bfloat16()
    x[40, 3] = torch.nan
    (out,) = lora_linears(x, parts)
    assert out[40].isnan().all()
    assert out[:40].isfinite().all() and out[41:].isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    ("width", "out", "dtype"),
    [
        (64, 128, torch.float32),
        (192, 300, torch.bfloat16),
        (3328, 70, torch.bfloat16),  # inner dimension of several passes
        (64, 3400, torch.bfloat16),
    ],
    ids=str,
)
def test_4bit_weights_are_dequantized_as_by_bitsandbytes(width, out, dtype, double, kind):
    import bitsandbytes as bnb

    torch.manual_seed(2)
    values = torch.randn(out, width, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        width, out, bias=False, quant_type=kind, compress_statistics=double
    ).requires_grad_(False)
    layer.weight = bnb.nn.Params4bit(
        values, requires_grad=False, quant_type=kind, compress_statistics=double
    ).to("cpu")
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(width, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.data.copy_(values)
    x = torch.randn(9, width).bfloat16().requires_grad_()
    down, up = torch.randn(4, width, requires_grad=True), torch.randn(out, 4, requires_grad=True)
    grad_output = [torch.randn(9, out).bfloat16()]
    results = [
        found_by(x, [Adapted(which, down, up, 0.5)], grad_output) for which in (layer, plain)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    nothing = Adapted(layer, torch.zeros_like(down).requires_grad_(), torch.zeros_like(up), 1.0)
    (columns,) = lora_linears(torch.eye(width).bfloat16(), [nothing])
    assert torch.equal(columns.T, plain.weight)  # each value, not only their sums


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"down": torch.zeros(3, 24), "up": torch.zeros(40, 3)},  # odd rank
        {"down": torch.zeros(4, 24).bfloat16(), "up": torch.zeros(40, 4).bfloat16()},
    ],
    ids=["dropout", "odd rank", "adapters in 16 bits"],
)
def test_unsupported_layers_use_torch(change):
    (part,) = layers_of(24, (40,), (4,))
    part = Adapted(**{**vars(part), **change})
    x = torch.randn(5, 24).bfloat16().requires_grad_()
    (out,) = lora_linears(x, [part])
    assert type(out.grad_fn).__name__ == "_LoraLinearsBackward"


def test_activation_checkpointing_uses_torch_in_both_passes(monkeypatch):
    (part,) = layers_of(24, (40,), (4,))
    found, choose = [], linear._kernels_for
    monkeypatch.setattr(
        linear, "_kernels_for", lambda *given: found.append(choose(*given)) or found[-1]
    )
    x = torch.randn(5, 24).bfloat16().requires_grad_()
    checkpoint(lambda x: lora_linears(x, [part])[0], x, use_reentrant=False).sum().backward()
    assert found == [None, None]
    lora_linears(x, [part])
    assert found[2] is not None


def test_an_inplace_change_of_an_adapter_before_backward_is_an_error():
    (part,) = layers_of(24, (40,), (4,))
    (out,) = lora_linears(torch.randn(5, 24).bfloat16(), [part])
    with torch.no_grad():
        part.down.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
