"""Shared by all tests: quiet libraries, no network, no GPU, one thread, a cache of their own."""

import contextlib
import importlib.util
import itertools
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XTUNER_STRICT"] = "1"  # a fault in the forecast, which runs survive, fails the test
# Tiny models gain nothing from threads, and threads of parallel processes slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from suite_rules import LONGEST_ID, id_faults, wants_gpu

FAKE_CUDA = None
if os.environ.get("XTUNER_FAKE_CUDA"):  # to run the tests marked `gpu` without a GPU
    from xtuner.testing.fake_cuda import device

    FAKE_CUDA = device.install(2**40)
    if os.environ["XTUNER_FAKE_CUDA"] == "liger":  # with torch's functions in place of liger's
        from liger_stub import Stand

        sys.modules.update(Stand().modules)

COMPILED = ("kernels", "fake_cuda")


def pytest_configure(config):
    """Hide GPUs from torch, which is not imported yet: tests that choose a device must behave the
    same on every machine. Re-enable Ctrl-C, which background jobs of scripts ignore, here and in
    child processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Reject test ids that may differ between runs or processes."""
    if faults := id_faults([item.nodeid for item in items]):
        raise pytest.UsageError(
            f"{len(faults)} test ids are not constant, printable, short (at most {LONGEST_ID}) and "
            f"unique; give the cases ids: {faults[:5]}"
        )
    for item in items:
        if item.get_closest_marker("gpu") and not wants_gpu(config.option.markexpr):
            item.add_marker(pytest.mark.skip(reason="GPUs are hidden; choose tests by -m gpu"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed random numbers, so that tests and fixtures do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def fake_cuda():
    """The fake CUDA device, or None."""
    return FAKE_CUDA


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of the CPU kernels and the fake CUDA device, so that they are compiled once for
    all tests of all processes (pytest-xdist)."""
    base = tmp_path_factory.getbasetemp()
    spread = "PYTEST_XDIST_WORKER" in os.environ
    folder = (base.parent if spread else base) / "compiled"
    for name in COMPILED:
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    if spread and importlib.util.find_spec("xtuner.kernels.cpu"):  # the folder is optional
        from xtuner.kernels.cpu import build

        with alone(folder), cache_at(folder):
            build.library()
    return folder


@pytest.fixture(scope="session")
def fake_cuda_ready(compiled):
    """Compile the fake CUDA device, in one of the processes."""
    from xtuner.testing.fake_cuda import device

    with alone(compiled), cache_at(compiled):
        device.prepare()


@contextlib.contextmanager
def alone(folder):
    """Let one process at a time enter the block."""
    import fcntl  # not on Windows

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def cache_at(folder):
    """Let xtuner use `folder` as its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTUNER_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """An endless sequence of names of new folders."""
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches, monkeypatch, compiled):
    """Keep encoded data sets and fetched models out of the user's cache."""
    folder: Path = next(caches)
    folder.mkdir()
    for name in COMPILED:
        (folder / name).symlink_to(compiled / name, target_is_directory=True)
    monkeypatch.setenv("XTUNER_CACHE", str(folder))


@pytest.fixture(autouse=True)
def same_threads_after():
    """Restore torch's number of threads, which a run changes."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """A tiny Llama with a ChatML tokenizer, in a folder that tests must not write to."""
    from xtuner.testing.tiny import tiny_model_folder

    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny")
