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


def _forget():
    for known in (build.library, build.has_products, bindings._kernels):
        known.cache_clear()


@pytest.fixture(params=["tiles", "vectors"] if HAS_TILES else ["vectors"])
def units(request, monkeypatch):
    """Let the compiled functions use each kind of unit that this CPU multiplies with."""
    if request.param == "vectors" and HAS_TILES:
        monkeypatch.setattr(build, "may_use_tiles", lambda: False)
        _forget()
        request.addfinalizer(_forget)
    rows = {"tiles": 32, "vectors": 6}[request.param]
    assert build.library()[0].rows_of_block() == rows


CANARY = 4096


@pytest.fixture
def guarded(monkeypatch):
    """Fail where something is written behind the working memory of compiled functions."""
    rooms, measured = [], bindings.Kernels.room

    def room(self, *arguments):
        exact = measured(self, *arguments)
        rooms.append(torch.full((len(exact) + CANARY,), 77, dtype=torch.uint8))
        return rooms[-1][:-CANARY]

    monkeypatch.setattr(bindings.Kernels, "room", room)
    yield
    assert all((memory[-CANARY:] == 77).all() for memory in rooms)
