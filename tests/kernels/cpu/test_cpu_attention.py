"""Attention as one compiled call against the formula in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from xtuner.kernels.attention.blocks import block_attention, cpu_attention
from xtuner.kernels.cpu import build

pytestmark = [
    pytest.mark.usefixtures("units", "guarded"),
    pytest.mark.skipif(not build.has_products(), reason="no bfloat16 vectors here, or no compiler"),
]

CU_SEQLENS = {
    "short samples": (0, 1, 2, 8, 72, 73),
    "around the blocks of 64": (0, 63, 127, 192, 257),
    "more keys than in a block": (0, 1100, 1300),
}


def inputs_of(cu_seqlens, heads, kv_heads, width, *, rotated):
    """Views of one projection, as of a layer with a fused qkv."""
    generator = torch.Generator().manual_seed(0)
    total = cu_seqlens[-1]
    qkv = torch.randn(total, (heads + 2 * kv_heads) * width, generator=generator).bfloat16()
    parts = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    q, k, v = (part.unflatten(1, (-1, width)).requires_grad_() for part in parts)
    angles = torch.rand(total, width, generator=generator) * 6
    grad_output = torch.randn(total, heads, width, generator=generator).bfloat16()
    return (q, k, v), (angles.cos(), angles.sin()) if rotated else None, grad_output


def formula(q, k, v, cu_seqlens, *, scale, window, rotation):
    """One sample at a time, with the full score matrix."""
    if rotation is not None:
        cos, sin = (angle.double()[:, None] for angle in rotation)
        halves = (torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) for x in (q, k))
        q, k = (x * cos + half * sin for x, half in zip((q, k), halves, strict=True))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    outs = []
    for start, end in itertools.pairwise(cu_seqlens):
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        part = (x[start:end].transpose(0, 1) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale))
    return torch.cat([out.transpose(0, 1) for out in outs])


@pytest.mark.parametrize("rotated", [False, True], ids=["as they are", "rotated"])
@pytest.mark.parametrize("window", [None, 7, 100, 600], ids="window={}".format)
@pytest.mark.parametrize(
    "heads", [(4, 4, 32), (9, 3, 64), (2, 1, 96), (2, 1, 256)], ids="{0[0]}:{0[1]}x{0[2]}".format
)
@pytest.mark.parametrize("cu_seqlens", CU_SEQLENS.values(), ids=CU_SEQLENS)
def test_values_and_gradients(cu_seqlens, heads, window, rotated):
    inputs, rotation, grad_output = inputs_of(cu_seqlens, *heads, rotated=rotated)
    options = {"scale": heads[2] ** -0.5, "window": window, "rotation": rotation}
    out = cpu_attention(*inputs, cu_seqlens, **options)
    assert type(out.grad_fn).__name__ == "_CompiledAttentionBackward"
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = formula(*wide, cu_seqlens, **options)
    found = [out, *torch.autograd.grad(out, inputs, grad_output)]
    wanted = [exact, *torch.autograd.grad(exact, wide, grad_output.double())]
    for ours, plain in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - plain).norm() < 0.006 * plain.norm()  # 8 bits: 0.002 by rounding
        assert (ours.double() - plain).abs().max() < 0.02 * plain.abs().max()


def test_scores_far_apart_and_far_from_zero():
    """The softmax subtracts the maximum, so large scores do not overflow."""
    (q, k, v), _, grad_output = inputs_of((0, 300), 2, 2, 64, rotated=False)
    found, wanted = [], []
    for results, kind in ((found, torch.bfloat16), (wanted, torch.float64)):
        inputs = [(x.detach() * (20 if x is not v else 1)).to(kind) for x in (q, k, v)]
        inputs = [x.requires_grad_() for x in inputs]
        if kind == torch.bfloat16:
            out = cpu_attention(*inputs, (0, 300), scale=0.125)
        else:
            out = formula(*inputs, (0, 300), scale=0.125, window=None, rotation=None)
        results += [out, *torch.autograd.grad(out, inputs, grad_output.to(kind))]
    for ours, plain in zip(found, wanted, strict=True):
        assert (ours.double() - plain).norm() < 0.02 * plain.norm()


def test_a_very_long_sample_stays_within_its_memory():
    """Tokens outside the window change nothing, so the end can be compared with a short row."""
    length, window, end = 33000, 64, 300
    (q, k, v), _, grad_output = inputs_of((0, length), 1, 1, 32, rotated=False)
    found, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # an overflow would then go past the end of the memory
        for some in (slice(None), slice(-end, None)):
            inputs = [x.detach()[some].requires_grad_() for x in (q, k, v)]
            out = cpu_attention(*inputs, (0, len(inputs[0])), scale=0.2, window=window)
            grads = torch.autograd.grad(out, inputs, grad_output[some])
            found.append([x[-end // 2 :].float() for x in (out, *grads)])
    finally:
        torch.set_num_threads(before)
    for long, short in zip(*found, strict=True):
        assert (long - short).norm() < 0.005 * short.norm()  # blocks start at other tokens


def test_the_number_of_threads_changes_nothing():
    cu_seqlens = (0, 90, 91, 400, 500)
    inputs, rotation, grad_output = inputs_of(cu_seqlens, 6, 2, 32, rotated=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = cpu_attention(*inputs, cu_seqlens, scale=0.2, rotation=rotation)
            results.append([out, *torch.autograd.grad(out, inputs, grad_output)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays_in_its_sample_and_is_propagated_there():
    cu_seqlens = (0, 70, 140, 200)
    inputs, _, grad_output = inputs_of(cu_seqlens, 2, 1, 32, rotated=False)
    with torch.no_grad():
        inputs[1][100, 0, 3] = torch.nan
    out = cpu_attention(*inputs, cu_seqlens, scale=0.2)
    found = [out, *torch.autograd.grad(out, inputs, grad_output)]
    for x in found:
        assert x[:70].isfinite().all() and x[140:].isfinite().all()
    assert out[100:140].isnan().all() and out[70:100].isfinite().all()
    assert all(x[100:140].isnan().any() for x in found)


def test_other_head_sizes_and_dtypes_use_block_attention():
    for width, dtype in ((16, torch.bfloat16), (80, torch.bfloat16), (32, torch.float32)):
        x = torch.randn(40, 2, width, dtype=dtype, requires_grad=True)
        out = cpu_attention(x, x, x, (0, 40), scale=0.2)
        assert type(out.grad_fn).__name__ == "_BlockAttentionBackward"
        assert torch.equal(out, block_attention(x, x, x, (0, 40), scale=0.2))
    q, v = torch.randn(2, 40, 2, 32).bfloat16().requires_grad_()
    narrow = v[..., :16]
    assert cpu_attention(q, q, narrow, (0, 40), scale=0.2).shape == narrow.shape
