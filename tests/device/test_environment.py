"""Environment variables that are set before torch is imported."""

import os
import sys

import pytest

from xtuner.device.environment import SPINS, set_up_memory, set_up_threads

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
@pytest.mark.parametrize("given", [None, *NAMES])
def test_the_memory_of_a_gpu_may_grow_unless_the_user_says_how(monkeypatch, given):
    own = {given: "max_split_size_mb:64"} if given else {}
    environment = dict(own)
    monkeypatch.setattr(os, "environ", environment)
    set_up_memory("auto")
    found = {name: value for name, value in environment.items() if name in NAMES}
    assert found == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_the_matrix_library_keeps_few_shapes_unless_the_user_says_how_many(monkeypatch):
    environment = {"LRU_CACHE_CAPACITY": "9"}
    monkeypatch.setattr(os, "environ", environment)
    set_up_memory("cpu")
    assert environment == {"LRU_CACHE_CAPACITY": "9", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}],
                         ids=["nothing", "policy", "count"])  # fmt: skip
def test_waiting_threads_sleep_soon_unless_the_user_says_how(monkeypatch, given):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    set_up_threads()
    assert environment == (given or {"GOMP_SPINCOUNT": SPINS})
