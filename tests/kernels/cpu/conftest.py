"""Shared by the tests of the compiled CPU kernels."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("xtuner.kernels.cpu") is None:  # the folder is optional
    collect_ignore_glob = ["test_*.py"]
    HAS_TILES = False
else:
    from xtuner.kernels.cpu import bindings, build

    HAS_TILES = " amx_bf16" in build.cpu_flags() and build.may_use_tiles()


def _clear_caches():
    for known in (build.library, build.has_products, bindings._kernels):
        known.cache_clear()


@pytest.fixture(params=["tiles", "vectors"] if HAS_TILES else ["vectors"])
def units(request, monkeypatch):
    """Run with each instruction set for bfloat16 products that this CPU has."""
    if request.param == "vectors" and HAS_TILES:
        monkeypatch.setattr(build, "may_use_tiles", lambda: False)
        _clear_caches()
        request.addfinalizer(_clear_caches)
    rows = {"tiles": 32, "vectors": 6}[request.param]
    assert build.library()[0].rows_of_block() == rows


CANARY = 4096


@pytest.fixture
def guarded(monkeypatch):
    """Fail if compiled functions write past the end of their scratch memory."""
    buffers, allocate = [], bindings.Kernels.scratch

    def scratch(self, *arguments):
        exact = allocate(self, *arguments)
        buffers.append(torch.full((len(exact) + CANARY,), 77, dtype=torch.uint8))
        return buffers[-1][:-CANARY]

    monkeypatch.setattr(bindings.Kernels, "scratch", scratch)
    yield
    assert all((memory[-CANARY:] == 77).all() for memory in buffers)
