"""The loss from hidden states against the formula, in float64."""

import pytest
import torch
from torch.nn import functional as F

from xtuner.kernels import cross_entropy as loss


def problem(vocabulary=97, positions=23, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 16, 23, 40])
def test_value_and_gradients_equal_the_plain_formula(positions, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 0)  # several chunks, the last smaller
    hidden, weight, targets = problem(positions=positions)
    ours = -loss.log_probabilities(hidden, weight, targets).sum()
    grads = torch.autograd.grad(ours * 0.37, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.37, (hidden, weight))
    assert ours.dtype == torch.float64
    assert abs(ours.item() - plain.item()) < 1e-12 * abs(plain.item())
    for ours_grad, plain_grad in zip(grads, expected, strict=True):
        assert (ours_grad - plain_grad).abs().max() < 1e-12 * plain_grad.abs().max()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = problem()
    weight.requires_grad_(False)
    loss.log_probabilities(hidden, weight, targets).sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_bfloat16_stays_close_to_float32():
    hidden, weight, targets = problem(dtype=torch.float32)
    exact = -loss.log_probabilities(hidden, weight, targets).sum()
    rough = -loss.log_probabilities(hidden.bfloat16(), weight.bfloat16(), targets).sum()
    assert abs(rough.item() - exact.item()) < 0.01 * exact.item()


def test_no_grad_saves_nothing():
    hidden, weight, targets = problem()
    with torch.no_grad():
        value = -loss.log_probabilities(hidden, weight, targets).sum()
    assert not value.requires_grad
    assert (
        abs(value.item() - F.cross_entropy(hidden @ weight.T, targets, reduction="sum").item())
        < 1e-3
    )


def test_chunk_sizes_are_few():
    """Each keeps generated code in memory for the rest of the run."""
    steps = {loss.chunk_rows(count, 49152, 2) for count in range(1, 3000)}
    assert len(steps) < 30
    for count in (1, 17, 300, 682, 700, 2999):
        step = loss.chunk_rows(count, 49152, 2)
        parts = -(-count // step)
        assert count <= parts * step < 1.2 * count + 16
        assert step * 49152 * 2 <= 1.1 * loss.LOGITS_BYTES


def float16_errors(weight, sharpness, *, scale, positions=64):
    """Relative errors of the gradients in float16 of a scaled mean, against float64 on the same
    numbers."""
    generator = torch.Generator().manual_seed(3)
    vocabulary, width = weight.shape
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    hidden = torch.randn(positions, width, generator=generator)
    hidden += sharpness * weight[targets].float()  # as after some training
    small = [x.half().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in small]
    value = -loss.log_probabilities(*small, targets).sum()
    grads = torch.autograd.grad(value * (scale / positions), small)
    plain = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="mean")
    wanted = torch.autograd.grad(plain, exact)
    assert abs(value.item() / positions - plain.item()) < 2e-3 * max(1.0, plain.item())
    pairs = zip(grads, wanted, strict=True)
    return [float((g.double() / scale - w).norm() / w.norm()) for g, w in pairs]


@pytest.mark.parametrize("sharpness", [0.0, 0.6], ids=["random", "learned"])
def test_float16_gradients_do_not_underflow(sharpness):
    """A vocabulary of 50,000, whose probabilities are close to the smallest float16 number."""
    weight = torch.randn(50_000, 32, generator=torch.Generator().manual_seed(1))
    assert max(float16_errors(weight, sharpness, scale=2.0**12)) < 3e-3


def test_float16_takes_a_scale_above_its_largest_number():
    weight = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)) * 0.02
    of_hidden, of_weight = float16_errors(weight, 0.0, scale=2.0**20, positions=3)
    assert of_hidden < 2e-3
    assert of_weight == float("inf")  # the gradient itself overflows, which the loss scaler detects


def test_the_gradient_of_a_head_does_not_overflow_in_float16():
    """4,000 tokens with the same wrong prediction: the sum of hidden states exceeds 65,504."""
    hidden = torch.full((4000, 16), 30.0).half().requires_grad_()
    weight = torch.zeros(97, 16).requires_grad_()  # float32, as with autocast
    targets = torch.full((4000,), 5)
    with torch.autocast("cpu", torch.float16):
        value = -loss.log_probabilities(hidden, weight, targets).sum()
    (value / 4000).backward()
    wanted = torch.full((97, 16), 30.0 / 97)
    wanted[5] -= 30
    assert (weight.grad - wanted).norm() < 1e-3 * wanted.norm()
