"""Shared by all tests: quiet libraries, no network, a cache of their own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XTUNER_STRICT"] = "1"  # a fault in the forecast, which runs survive, fails the test

import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the CPU kernels lie, so that they are compiled once for all tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, compiled):
    """Keep encoded data sets and fetched models out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "kernels").symlink_to(compiled, target_is_directory=True)
    monkeypatch.setenv("XTUNER_CACHE", str(folder))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """A tiny Llama with a ChatML tokenizer, in a folder that tests must not write to."""
    from xtuner.testing.tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
