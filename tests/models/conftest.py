"""Shared by the tests of models."""

import pytest

from xtuner.models import cpu_kernels

HAS_TILES = " amx_bf16" in cpu_kernels._cpu_flags() and cpu_kernels._may_use_tiles()


def _forget():
    for known in (cpu_kernels._library, cpu_kernels._has_products, cpu_kernels._kernels):
        known.cache_clear()


@pytest.fixture(params=["tiles", "vectors"] if HAS_TILES else ["vectors"])
def units(request, monkeypatch):
    """Let the compiled functions use each kind of unit that this CPU multiplies with."""
    if request.param == "vectors" and HAS_TILES:
        monkeypatch.setattr(cpu_kernels, "_may_use_tiles", lambda: False)
        _forget()
        yield
        _forget()
    else:
        yield
