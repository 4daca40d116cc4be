"""The compiled kernels against the formulas, and the behaviour without a compiler."""

import itertools
import os
import shutil

import pytest
import torch
from torch.nn import functional as F

from xtuner.device import compile
from xtuner.kernels.attention.blocks import block_attention
from xtuner.kernels.cpu import bindings, build
from xtuner.kernels.cpu.bindings import kernels_for
from xtuner.kernels.cross_entropy import log_probabilities
from xtuner.kernels.fused.norm_mlp import RMSNorm, _RMSNorm, _SiluProduct

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Maximum difference relative to the largest value; bfloat16 has 8 significant bits."""

pytestmark = pytest.mark.skipif(
    build.library()[0] is None, reason=f"no kernels here: {build.state()}"
)


@pytest.fixture(params=LIMITS, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """Rounding to bfloat16 comes close to the limits, so the inputs are fixed."""
    torch.manual_seed(0)


def numbers(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()


def check(ours, plain, inputs, dtype):
    """Values and gradients of `ours` against `plain` in float64, of the same rounded inputs."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = ours(*inputs), plain(*wide)
    grad_output = torch.randn_like(wanted)
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad(got, inputs, grad_output.to(got.dtype)),
        torch.autograd.grad(wanted, wide, grad_output.to(got.dtype).double()),
        strict=True,
    )
    for a, b in pairs:
        assert a.dtype in (dtype, torch.float32)
        assert (a.double() - b).abs().max() <= LIMITS[dtype] * b.abs().max()


@pytest.mark.parametrize("width", [2, 7, 64, 577])
def test_rms_norm(dtype, width):
    x, weight = numbers(3, 11, width, dtype=dtype), numbers(width, dtype=dtype, seed=1).detach()
    layer = RMSNorm(torch.nn.Parameter(weight), 1e-5)
    layer.weight.requires_grad_(False)
    assert kernels_for(x, weight)
    check(
        layer,
        lambda x: weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
        [x],
        dtype,
    )


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_rms_norm_with_a_trained_weight(dtype, rows):
    x, weight = numbers(rows, 33, dtype=dtype), numbers(33, dtype=dtype, seed=1)

    def ours(x, weight):
        return _RMSNorm.apply(x, weight, 1e-5)

    def formula(x, weight):
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    check(ours, formula, [x, weight], dtype)


def test_silu_product_far_from_zero_too(dtype):
    gate, up = numbers(2, 5, 33, dtype=dtype, scale=30), numbers(2, 5, 33, dtype=dtype, seed=1)
    check(_SiluProduct.apply, lambda gate, up: F.silu(gate) * up, [gate, up], dtype)


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_cross_entropy_of_flat_and_of_sharp_logits(dtype, scale):
    hidden, head = numbers(9, 8, dtype=dtype, scale=scale), numbers(300, 8, dtype=dtype, seed=1)
    targets = torch.arange(9) * 31
    rounded = (hidden @ head.T).detach()  # the kernel gets rounded logits
    got = -log_probabilities(hidden, head.detach(), targets).sum()
    wanted = F.cross_entropy(rounded.double(), targets, reduction="sum")
    assert abs(got.item() - wanted.item()) <= 1e-5 * abs(wanted.item())
    (grad,) = torch.autograd.grad(got, hidden)
    error = rounded.double().softmax(-1) - F.one_hot(targets, 300)
    exact = error @ head.detach().double()
    assert (grad.double() - exact).abs().max() <= 2 * LIMITS[dtype] * exact.abs().max()


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_outside_the_vocabulary_is_an_error_and_nothing_is_written(dtype, target):
    memory = torch.zeros(32, dtype=dtype)
    logits = memory[8:16].view(2, 4)
    with pytest.raises(IndexError, match=f"target {target} .* vocabulary of 4"):
        kernels_for(logits).cross_entropy(logits, torch.tensor([[1], [target]]), True)
    assert not memory.any()


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


@pytest.mark.parametrize("window", [None, 30], ids="window={}".format)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3)], ids=str)
def test_rotary_attention(dtype, heads, window):
    cu_seqlens = (0, 7, 8, 100, 101, 260)
    q, k, v = (numbers(260, n, 16, dtype=dtype, seed=i) for i, n in enumerate((*heads, heads[1])))
    angles = torch.rand(260, 16) * 6
    rotation = angles.cos(), angles.sin()

    def plain(q, k, v):
        outputs = []
        q, k = (rotated(x, *(angle.double() for angle in rotation)) for x in (q, k))
        k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
        for start, end in itertools.pairwise(cu_seqlens):
            seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            part = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*part, attn_mask=seen, scale=0.25)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def ours(q, k, v):
        return block_attention(q, k, v, cu_seqlens, scale=0.25, window=window, rotation=rotation)

    limit = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}[dtype]
    check(ours, plain, [q, k, v], limit)


def test_rotation_without_kernels_equals_the_formula():
    q, k, v = (numbers(90, n, 8, dtype=torch.float64, seed=n) for n in (4, 2, 2))
    angles = torch.rand(90, 8, dtype=torch.float64) * 6
    rotation = angles.cos(), angles.sin()

    def rotate_first(q, k, v):
        q, k = (rotated(x, *rotation) for x in (q, k))
        return block_attention(q, k, v, (0, 50, 90), scale=0.3)

    ours = block_attention(q, k, v, (0, 50, 90), scale=0.3, rotation=rotation)
    grad_output = torch.randn_like(ours)
    assert (ours - rotate_first(q, k, v)).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad_output),
        torch.autograd.grad(rotate_first(q, k, v), (q, k, v), grad_output),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


def test_unsupported_tensors_are_left_to_torch():
    assert kernels_for(torch.zeros(2, dtype=torch.float64)) is None
    assert kernels_for(torch.zeros(2, dtype=torch.float16)) is None
    assert kernels_for(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)) is None
    assert kernels_for(torch.zeros(4, 4).T) is None
    assert kernels_for(torch.zeros(2, device="meta")) is None


@pytest.fixture
def fresh_library():
    """Load the library again, in the test and after it."""
    caches = build.library, bindings._kernels
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_torch_does_the_work_and_the_run_says_so(fresh_library, monkeypatch):
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    assert kernels_for(torch.zeros(2)) is None
    assert "no C compiler" in build.state()


def test_a_second_openmp_runtime_is_not_loaded(fresh_library, monkeypatch):
    assert len(build.openmp_runtimes()) >= 1  # torch's
    answers = [{"/torch/libgomp.so.1"}, {"/torch/libgomp.so.1", "/usr/lib/libomp.so"}]
    monkeypatch.setattr(build, "openmp_runtimes", lambda: answers.pop(0))
    assert kernels_for(torch.zeros(2)) is None
    assert "/usr/lib/libomp.so" in build.state()


def test_compiler_failure_is_reported_and_not_fatal(fresh_library, monkeypatch, tmp_path):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path))
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cannot find -lgomp' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(compile.shutil, "which", lambda name: str(compiler))
    assert kernels_for(torch.zeros(2)) is None
    assert "cannot find -lgomp" in build.state()
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.parametrize("what", ["folder", "file", "owner"])
def test_a_library_that_others_can_write_is_not_loaded(fresh_library, monkeypatch, tmp_path, what):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path))
    assert kernels_for(torch.zeros(2)) is not None
    (library,) = (tmp_path / "kernels").glob("*.so")
    assert not (library.stat().st_mode | library.parent.stat().st_mode) & 0o022
    build.library.cache_clear()
    if what == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(library, 12345, -1)
    else:
        {"folder": library.parent, "file": library}[what].chmod(0o770)
    assert kernels_for(torch.zeros(2)) is None
    assert "other users can write" in build.state() and "XTUNER_CACHE" in build.state()


def test_another_version_of_the_compiler_compiles_anew(fresh_library, monkeypatch, tmp_path):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path))
    compiler = tmp_path / "cc"
    for note in ("one", "another"):
        compiler.write_text(f'#!/bin/sh\n# {note}\nexec {shutil.which("cc")} "$@"\n')
        compiler.chmod(0o755)
        build._compiled(str(compiler))
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2
