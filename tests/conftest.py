"""Shared by all tests: quiet libraries, no network, a cache of their own."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XTUNER_STRICT"] = "1"  # a fault in the forecast, which runs survive, fails the test

import pytest

FAKE_CUDA = None
if os.environ.get("XTUNER_FAKE_CUDA"):  # to walk the tests marked `gpu` where there is no GPU
    from xtuner.testing.fake_cuda import device

    FAKE_CUDA = device.install(2**40)
    if os.environ["XTUNER_FAKE_CUDA"] == "liger":  # with torch's functions in liger's places
        from liger_stand import Stand

        sys.modules.update(Stand().modules)

COMPILED = ("kernels", "paper_gpu")


@pytest.fixture(scope="session")
def fake_cuda():
    """The fake CUDA device, or None."""
    return FAKE_CUDA


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the CPU kernels and the GPU on paper lie, so that they are compiled once for all
    tests."""
    folder = tmp_path_factory.mktemp("compiled")
    for name in COMPILED:
        (folder / name).mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, compiled):
    """Keep encoded data sets and fetched models out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    for name in COMPILED:
        (folder / name).symlink_to(compiled / name, target_is_directory=True)
    monkeypatch.setenv("XTUNER_CACHE", str(folder))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """A tiny Llama with a ChatML tokenizer, in a folder that tests must not write to."""
    from xtuner.testing.tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
