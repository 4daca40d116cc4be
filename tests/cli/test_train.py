"""What `xtuner train` does before torch is there."""

import os
import sys

import pytest

from xtuner.cli import train

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
@pytest.mark.parametrize("given", [None, *NAMES])
def test_the_memory_of_a_gpu_may_grow_unless_the_user_says_how(monkeypatch, given):
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment = {**kept, **({given: "max_split_size_mb:64"} if given else {})}
    monkeypatch.setattr(os, "environ", environment)
    train._let_gpu_memory_grow()
    added = {} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment == {**kept, **added, **({given: "max_split_size_mb:64"} if given else {})}
