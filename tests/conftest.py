"""Shared by all tests: quiet libraries, no network, a cache of their own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep encoded data sets and fetched models out of the user's cache."""
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """A tiny Llama with a ChatML tokenizer, in a folder that tests must not write to."""
    from xtuner.testing.tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
