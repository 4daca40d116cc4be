"""Fixtures of tests that need a CUDA device: `pytest -m gpu tests/gpu`.

XTUNER_FAKE_CUDA=1 runs them on the fake CUDA device, which only shows that they run.
"""

import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.path.as_posix():
            # On unknown machines libraries may warn about each other's versions.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def card():
    """The device; memory that a test leaves allocated is freed."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()


@pytest.fixture
def limited(fake_cuda):
    """A function that limits how many additional bytes torch may allocate on the device."""
    if fake_cuda is not None:
        before = fake_cuda.memory
        yield lambda size: fake_cuda.limit(fake_cuda.allocated + size)
        fake_cuda.limit(before)
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]

    def limit(size: int) -> None:
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + size) / total))

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request):
    """16-bit dtypes that the device supports."""
    if request.param == "bfloat16" and not has_bfloat16():
        pytest.skip("this GPU has no bfloat16")
    return getattr(torch, request.param)


@pytest.fixture
def half():
    """The 16-bit dtype of this device."""
    return torch.bfloat16 if has_bfloat16() else torch.float16


@pytest.fixture
def close(half):
    """A function that asserts that a result in 16 bits is within `roundings` of the right one, as
    a share of its norm or of `size`."""

    def check(found: Tensor, wanted: Tensor, roundings: float = 4.0, size: float = 0.0) -> None:
        assert found.shape == wanted.shape
        found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
        assert found.isfinite().all()
        allowed = roundings * torch.finfo(half).eps / 2
        assert (found - wanted).norm() <= allowed * max(float(wanted.norm()), size)

    return check
