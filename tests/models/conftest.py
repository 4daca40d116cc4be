"""Shared by the tests of models."""

import pytest
import torch

from xtuner.models import cpu_kernels, cpu_library

HAS_TILES = " amx_bf16" in cpu_library.cpu_flags() and cpu_library.may_use_tiles()


def _forget():
    for known in (cpu_library.library, cpu_library.has_products, cpu_kernels._kernels):
        known.cache_clear()


@pytest.fixture(params=["tiles", "vectors"] if HAS_TILES else ["vectors"])
def units(request, monkeypatch):
    """Let the compiled functions use each kind of unit that this CPU multiplies with."""
    if request.param == "vectors" and HAS_TILES:
        monkeypatch.setattr(cpu_library, "may_use_tiles", lambda: False)
        _forget()
        request.addfinalizer(_forget)
    rows = {"tiles": 32, "vectors": 6}[request.param]
    assert cpu_library.library()[0].rows_of_block() == rows


CANARY = 4096


@pytest.fixture
def guarded(monkeypatch):
    """Fail where something is written behind the working memory of compiled functions."""
    rooms, measured = [], cpu_kernels.Kernels.room

    def room(self, *arguments):
        exact = measured(self, *arguments)
        rooms.append(torch.full((len(exact) + CANARY,), 77, dtype=torch.uint8))
        return rooms[-1][:-CANARY]

    monkeypatch.setattr(cpu_kernels.Kernels, "room", room)
    yield
    assert all((memory[-CANARY:] == 77).all() for memory in rooms)
