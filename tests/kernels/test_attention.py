"""Which kernel attention takes on a GPU, asked without one."""

import pytest
import torch

from xtuner.kernels import attention
from xtuner.memory.footprint import _Lengths

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def a_new_gpu(monkeypatch):
    caches = attention._choice, attention._flash_attn_function, attention._tell_once
    for kept in caches:
        kept.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    for kept in caches:
        kept.cache_clear()


def broken_package(folder):
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol')"
    )


@pytest.mark.parametrize("make", [lambda folder: (folder / "flash_attn").mkdir(), broken_package])
def test_a_flash_attn_that_cannot_be_imported_is_not_chosen(tmp_path, monkeypatch, make):
    make(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = attention.flash_kernel(GPU, torch.bfloat16, 64, 64)
    assert kernel is attention._torch_varlen


@pytest.mark.parametrize(
    ("dtype", "width", "why"),
    [
        (torch.bfloat16, 20, "multiple of 8"),
        (torch.bfloat16, 512, "heads of 512"),
        (torch.float32, 64, "float32"),
    ],
)
def test_where_no_kernel_fits_it_is_told_why(dtype, width, why):
    kernel, told = attention._choice(GPU, dtype, width, width)
    assert kernel is None and why in told


def test_the_slow_way_is_told_once(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no meta
    x = torch.empty(1, 4, 9, 8, device="meta")
    ends = _Lengths(torch.tensor([0, 5, 9]), (5, 4))

    def attend():
        return attention.packed_attention(None, x, x, x, None, cu_seq_lens_q=ends)[0]

    with pytest.warns(UserWarning, match="sample by sample.*: a meta has none"):
        assert attend().shape == (1, 9, 4, 8)
    attend()  # a second warning would be an error
