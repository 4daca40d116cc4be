"""The choice of attention kernels on a GPU, tested without one: functions with the signatures of
each release that compute attention by the formula are chosen, tested and called like real ones."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from xtuner.kernels.attention import call as varlen_call
from xtuner.kernels.attention import packed
from xtuner.kernels.attention import varlen as varlen_attention
from xtuner.kernels.attention.call import AttentionCall, Functions
from xtuner.kernels.attention.self_test import failure_of
from xtuner.kernels.attention.summary import attention_line, calls_of
from xtuner.kernels.attention.varlen import pick
from xtuner.testing.fake_cuda.attention import Rules, _attend, _attend_backward

CPU = torch.device("cpu")
CALL = AttentionCall(CPU, torch.bfloat16, 4, 4, 16, 16, 0.25)
FLASH = (
    "_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? "
    "cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool "
    "return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? "
    "window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None%s) -> (Tensor "
    "output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
FLASH_OF = {
    **dict.fromkeys(("2.8", "2.9", "2.10", "2.11"), FLASH % ""),
    **dict.fromkeys(("2.12", "2.13"), FLASH % ", Tensor? block_table=None, int? num_splits=None"),
}
"""From native_functions.yaml of each release."""
EFFICIENT = (
    "_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? "
    "cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float "
    "dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, Tensor? "
    "seqlen_k=None, int? window_size=None) -> (Tensor output, Tensor logsumexp, Tensor "
    "philox_seed, Tensor philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)"
)
EFFICIENT_BACKWARD = (
    "_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor "
    "philox_offset, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, int? "
    "num_splits_key=None, int? window_size=None, bool shared_storage_dqdkdv=False) -> (Tensor, "
    "Tensor, Tensor, Tensor)"
)
"""The same from 2.8 to 2.13."""


def samples(cu_seqlens, longest):
    parts = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    assert cu_seqlens.dtype == torch.int32
    assert longest == max(part.stop - part.start for part in parts)
    return parts


def reference(q, k, v, parts, *, scale, window=None, softcap=None):
    """Attention within each sample, by the formula."""
    outs, group = [], q.shape[1] // k.shape[1]
    for part in parts:
        a, b, c = (x[part].transpose(0, 1) for x in (q, k, v))
        b, c = b.repeat_interleave(group, 0), c.repeat_interleave(group, 0)
        scores = a @ b.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(outs)


def flash(q, k, v, parts, *, scale, left, right):
    """Flash attention: checks what it supports, and applies the given window."""
    width = q.shape[-1]
    if width % 8 or width > 256 or k.shape[-1] != width or v.shape[-1] != width:
        raise RuntimeError(f"head sizes {width} {k.shape[-1]} {v.shape[-1]}")
    assert right == 0  # causal, by either argument
    window = None if left is None or left < 0 else left + 1
    return reference(q, k, v, parts, scale=scale or width**-0.5, window=window)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False,
                return_aux=None):  # fmt: skip
    assert is_causal and cu_seq_k is cu_seq_q and max_k == max_q and return_aux is None
    return flash(query, key, value, samples(cu_seq_q, max_q), scale=None, left=-1, right=0)


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1)):  # fmt: skip
    left, right = window_size
    parts = samples(cu_seq_q, max_q)
    return flash(query, key, value, parts, scale=scale, left=left, right=right)


def varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
                block_table=None, num_splits=None):  # fmt: skip
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    left, right = window_size
    parts = samples(cu_seq_q, max_q)
    return flash(query, key, value, parts, scale=scale, left=left, right=right)


VARLEN_OF = {
    "2.10": varlen_2_10,
    "2.11": varlen_2_11,
    "2.12": varlen_2_12,
    "2.13": varlen_2_12,
}
"""From torch/nn/attention/varlen.py of each release; 2.8 and 2.9 have none."""


def package(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
            block_table=None):  # fmt: skip
    assert causal and not dropout_p
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = samples(cu_seqlens_q, max_seqlen_q)
    return reference(q, k, v, parts, scale=softmax_scale, window=window, softcap=softcap)


@pytest.fixture(scope="module")
def operations():
    """Operations with the schemas of a release, made once; `operations(release)`."""
    made = {}

    def flash_forward(query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *,
                      scale=None, window_size_left=None, window_size_right=None,
                      **none):  # fmt: skip
        assert not dropout and not debug and not any(x is not None for x in none.values())
        parts, right = samples(cum_q, max_q), 0 if is_causal else window_size_right
        out = flash(query, key, value, parts, scale=scale, left=window_size_left, right=right)
        return out, *(query.new_zeros(1) for _ in range(4))

    def rules(query, scale, window_size, dropout=0.0, seed=0):
        return Rules(scale, -1 if window_size is None else window_size - 1, 0, dropout, seed)

    def efficient(query, key, value, bias, cu_q, cu_k, most_q, most_k, dropout, mask, sums=False, *,
                  scale=None, seqlen_k=None, window_size=None):  # fmt: skip
        assert query.shape[2] == key.shape[2] == value.shape[2] and mask == 1 and bias is None
        assert query.shape[-1] * query.element_size() % 16 == 0
        seed = int(torch.randint(2**31, ())) if dropout else 0
        pairs = [(part, part) for part in samples(cu_q, most_q)]
        wide = [x[0].float() for x in (query, key, value)]
        out, logs = _attend(wide, pairs, rules(query, scale, window_size, dropout, seed))
        state = torch.tensor(seed), torch.tensor(0)
        return out[None].to(query.dtype), logs, *state, most_q, most_k

    def efficient_backward(grad, query, key, value, bias, out, cu_q, cu_k, most_q, most_k, logs,
                           dropout, seed, offset, mask, bias_grad, *, scale=None,
                           num_splits_key=None, window_size=None,
                           shared_storage_dqdkdv=False):  # fmt: skip
        pairs = [(part, part) for part in samples(cu_q, most_q)]
        wide = [x[0].float() for x in (grad, query, key, value, out)]
        how = rules(query, scale, window_size, dropout, int(seed))
        found = _attend_backward(wide, logs, pairs, how)
        return *(x[None].to(query.dtype) for x in found), query.new_zeros(0)

    def of(release):
        if release not in made:
            library = torch.library.Library(f"torch_{release.replace('.', '_')}", "DEF")
            made[release] = library
            for schema, function in (
                (FLASH_OF[release], flash_forward),
                (EFFICIENT, efficient),
                (EFFICIENT_BACKWARD, efficient_backward),
            ):
                library.define(schema)
                library.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
        return getattr(torch.ops, f"torch_{release.replace('.', '_')}")

    yield of
    for library in made.values():
        library._destroy()


@pytest.fixture
def offers(operations):
    def of(release, *names, capability=(9, 0)):
        ops = operations(release)
        every = {
            "flash": ops._flash_attention_forward.default,
            "varlen": VARLEN_OF.get(release),
            "package": package,
            "efficient": ops._efficient_attention_forward.default,
            "efficient_backward": ops._efficient_attention_backward.default,
        }
        return Functions(capability, **{name: every[name] for name in names})

    return of


SHAPES = {
    "equal": {},
    "gqa": {"heads": 6, "kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "window": {"window": 5},
    "odd": {"width": 20, "value_width": 20, "scale": 20**-0.5},
    "mla": {"width": 24, "value_width": 12, "scale": 0.3, "window": 4},
}


def results(function, call, dtype, lengths=(3, 9, 1, 14)):
    """Output and gradients for a row of random numbers."""
    torch.manual_seed(0)
    total, ends = sum(lengths), [0, *itertools.accumulate(lengths)]
    shapes = [(call.heads, call.width), (call.kv_heads, call.width)]
    shapes += [(call.kv_heads, call.value_width)]
    inputs = [torch.randn(total, *shape).to(dtype).requires_grad_() for shape in shapes]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    out = function(*inputs, cu_seqlens, max(lengths), call)
    grad_output = torch.randn(total, call.heads, call.value_width).to(dtype)
    return [out, *torch.autograd.grad(out, inputs, grad_output)]


def expected(call, dtype):
    def formula(q, k, v, cu_seqlens, longest, call):
        options = {"scale": call.scale, "window": call.window, "softcap": call.softcap}
        return reference(q, k, v, samples(cu_seqlens, longest), **options)

    return results(formula, call, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("release", FLASH_OF)
@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_flash_attention_of_every_release_is_plain_attention(offers, name, release, shape):
    call = replace(CALL, **SHAPES[shape])
    functions = offers(release, name)
    choice = pick(call, functions)
    if name == "varlen" and release in ("2.8", "2.9"):
        assert choice.kernel is None and "this torch has no varlen attention" in choice.line()
        return
    if name == "varlen" and release == "2.10" and shape in ("window", "odd", "mla"):
        lacking = "scale" if shape == "odd" else "window_size"
        assert choice.kernel is None and f"does not take {lacking} in this release" in choice.line()
        return
    assert choice.refused == () and choice.line() == choice.kernel.name
    for got, wanted in zip(
        results(choice.kernel, call, torch.float32), expected(call, torch.float32), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("release", ["2.8", "2.13"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (9, 0)], ids=lambda x: f"{x[0]}.{x[1]}")
def test_memory_efficient_attention_is_plain_attention(offers, release, shape, capability):
    call = replace(CALL, dtype=torch.float32, **SHAPES[shape])
    names = "flash", "varlen", "efficient", "efficient_backward"
    choice = pick(call, offers(release, *names, capability=capability))
    unsupported = "supports float16 and bfloat16, not float32"
    why = unsupported if capability > (8, 0) else "needs compute capability 8.0"
    assert choice.line().startswith(
        "varlen memory-efficient attention (torch), because torch's flash attention "
    )
    assert choice.line().count(why) == 1
    for got, wanted in zip(
        results(choice.kernel, call, torch.float32), expected(call, torch.float32), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_older_gpu_gets_nothing_in_bfloat16_and_float16_with_memory_efficient(offers):
    functions = offers(
        "2.13", "flash", "varlen", "efficient", "efficient_backward", capability=(7, 5)
    )
    choice = pick(CALL, functions)
    assert choice.kernel is None
    assert "does not support bfloat16 on compute capability 7.5" in choice.line()
    kernel = pick(replace(CALL, dtype=torch.float16), functions).kernel
    assert kernel.family == "memory-efficient attention"


def test_softcap_needs_the_flash_attn_package(offers):
    call = replace(CALL, softcap=2.0)
    choice = pick(call, offers("2.13", "flash", "varlen", "package"))
    assert "(flash-attn)" in choice.kernel.name and choice.refused == (
        "torch's flash attention does not support softcap",
    )
    got, wanted = results(choice.kernel, call, torch.float32), expected(call, torch.float32)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_dropout_is_the_same_in_forward_and_backward(offers):
    call = replace(CALL, dtype=torch.float32, dropout=0.3)
    functions = offers("2.13", "efficient", "efficient_backward")
    before = torch.get_rng_state()
    choice = pick(call, functions)
    assert choice.refused == () and torch.equal(torch.get_rng_state(), before)

    def careless(*args, **kwargs):
        return functions.efficient_backward(*args[:12], args[12] + 1, *args[13:], **kwargs)

    careless._schema = functions.efficient_backward._schema
    choice = pick(call, replace(functions, efficient_backward=careless))
    assert choice.kernel is None and "gradient of" in choice.line()


FAULTS = {
    "sees the neighbours": lambda k, q, key, v, cu, n, call: k(
        q, key, v, cu[[0, -1]].contiguous(), int(cu[-1]), call
    ),
    "a window too wide by one": lambda k, q, key, v, cu, n, call: k(
        q, key, v, cu, n, replace(call, window=call.window + 1)
    ),
    "another scale": lambda k, q, key, v, cu, n, call: k(
        q, key, v, cu, n, replace(call, scale=call.scale * 1.2)
    ),
    "heads of keys in another order": lambda k, q, key, v, cu, n, call: k(
        q, key.flip(1), v.flip(1), cu, n, call
    ),
    "no gradient of values": lambda k, q, key, v, cu, n, call: k(
        q, key, v.detach() + 0 * v, cu, n, call
    ),
    "not a number": lambda k, *args: k(*args) * float("nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_detected(offers, fault):
    call = replace(CALL, kv_heads=2, window=7)
    kernel = pick(call, offers("2.13", "flash")).kernel
    assert failure_of(kernel, call) == ""
    wrong = lambda *args: FAULTS[fault](kernel, *args)  # noqa: E731
    assert "relative error of the" in failure_of(wrong, call)


def test_next_kernel_is_tried_after_a_failure(offers):
    functions = offers("2.13", "flash", "varlen")

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    broken._schema = functions.flash._schema
    choice = pick(CALL, replace(functions, flash=broken))
    assert choice.line() == (
        "varlen flash attention (torch's varlen_attn), because varlen flash attention (torch) "
        "fails on this machine (RuntimeError: no kernel image is available for execution on the "
        "device)"
    )


def test_the_self_test_does_not_depend_on_the_state_of_the_caller(offers):
    """No grad mode, autocast, activation checkpointing."""
    functions, chosen = offers("2.13", "flash"), []

    def layer(x):
        chosen.append(pick(CALL, functions))
        return torch.sin(x)

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        with torch.no_grad():
            layer(x)
    assert len(chosen) == 3 and all(choice.refused == () for choice in chosen)


def test_the_installed_torch_accepts_the_calls():
    """Calls with meta tensors, against the schema of this torch."""
    functions = Functions(
        (9, 0), flash=torch.ops.aten._flash_attention_forward.default,
        varlen=varlen_call._torch_varlen(),
    )  # fmt: skip
    q, k = (torch.empty(12, n, 16, device="meta", dtype=torch.bfloat16) for n in (4, 2))
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    for kernel in varlen_attention.kernels(functions):
        for call in (replace(CALL, kv_heads=2), replace(CALL, kv_heads=2, window=3)):
            assert kernel.refusal(call) == ""
            assert kernel(q, k, k, cu_seqlens, 7, call).shape == q.shape
    for name in ("_efficient_attention_forward", "_efficient_attention_backward"):
        parameters = varlen_call.parameters_of(varlen_call._aten(name))
        assert {"scale", "window_size", "custom_mask_type"} <= parameters


def broken_package(folder):
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol')"
    )


@pytest.mark.parametrize("make", [lambda folder: (folder / "flash_attn").mkdir(), broken_package],
                         ids=["a folder", "for another torch"])  # fmt: skip
def test_a_flash_attn_that_cannot_be_imported_is_not_chosen(tmp_path, monkeypatch, make):
    make(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert varlen_call._flash_attn_package() is None


def test_per_sample_attention_warns_once(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # raises for meta
    monkeypatch.setattr(packed, "reported", set())
    x = torch.empty(1, 4, 9, 8, device="meta")
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)

    def attend():
        return packed.packed_attention(None, x, x, x, None, cu_seq_lens_q=ends)[0]

    with pytest.warns(UserWarning, match="one sample at a time.*no varlen attention kernel"):
        assert attend().shape == (1, 9, 4, 8)
    attend()  # a second warning would be an error


GPU = torch.device("cuda", 0)
BACKENDS = ("cudnn", "flash", "mem_efficient", "math")


def enabled():
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in BACKENDS]


def test_cudnn_is_off_within_and_nothing_else_changes():
    assert enabled() == [True] * 4
    with packed.without_cudnn(CPU):
        assert enabled() == [True] * 4
    with packed.without_cudnn(GPU), packed.without_cudnn(GPU):
        assert enabled() == [False, True, True, True]
    assert enabled() == [True] * 4
    only = torch.nn.attention.SDPBackend.MATH
    with torch.nn.attention.sdpa_kernel(only), packed.without_cudnn(GPU):
        assert enabled() == [False, False, False, True]  # what the caller disabled stays disabled


def test_without_cudnn_can_be_compiled():
    def attend(x):
        with packed.without_cudnn(GPU):
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return x + 1

    x = torch.ones(1, 2, 3, 8)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), attend(x))


class Config:
    """The configuration of a language model."""

    num_attention_heads, num_key_value_heads, hidden_size = 8, 2, 128

    def __init__(self, **more):
        vars(self).update(more)

    def get_text_config(self):
        return self


def test_calls_are_known_from_the_configuration():
    kinds = ["sliding_attention", "full_attention"]
    found = calls_of(
        Config(
            head_dim=32, sliding_window=64, layer_types=kinds, query_pre_attn_scalar=16,
            attn_logit_softcapping=50.0, attention_dropout=0.1,
        ),
        GPU,
        torch.bfloat16,
    )  # fmt: skip
    wanted = AttentionCall(GPU, torch.bfloat16, 8, 2, 32, 32, 0.25, 64, 50.0, 0.1)
    assert found == [wanted, replace(wanted, window=None)]
    (plain,) = calls_of(Config(sliding_window=64, use_sliding_window=False), CPU, torch.float32)
    assert plain == AttentionCall(CPU, torch.float32, 8, 2, 16, 16, 0.25)
    (low,) = calls_of(
        Config(kv_lora_rank=4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24),
        CPU, torch.float32,
    )  # fmt: skip
    assert (low.width, low.value_width) == (48, 24)


def test_the_line_of_a_run(monkeypatch):
    of_cpu = lambda **more: attention_line(Config(**more), CPU, torch.float64)  # noqa: E731
    assert of_cpu() == "block-wise varlen attention"
    assert of_cpu(attention_dropout=0.1).endswith("on a CPU does not support dropout")
    chosen = attention_line(Config(), CPU, torch.float32, implementation="eager")
    assert chosen == "transformers' eager (attn_implementation)"
    old = Functions(
        (7, 5), flash=torch.ops.aten._flash_attention_forward.default,
    )  # fmt: skip
    monkeypatch.setattr(varlen_attention, "functions_for", lambda device: old)
    monkeypatch.setattr(packed, "reported", set())
    varlen_attention.choose.cache_clear()
    line = attention_line(Config(), GPU, torch.float16)
    varlen_attention.choose.cache_clear()
    why = "torch's flash attention needs compute capability 8.0 (Ampere), not 7.5"
    assert line == f"one call per sample, because {why}" and packed.reported == {why}


def test_signatures_above_are_those_of_the_release():
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in FLASH_OF:
        pytest.skip(f"torch {release} is not among them")
    for schema in (FLASH_OF[release], EFFICIENT, EFFICIENT_BACKWARD):
        operation = varlen_call._aten(schema.split("(")[0])
        assert str(operation._schema).removeprefix("aten::") == schema
    found, ours = varlen_call._torch_varlen(), VARLEN_OF.get(release)
    assert (found is None) == (ours is None)
    if found is not None:
        assert list(inspect.signature(found).parameters) == list(inspect.signature(ours).parameters)
