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
# Tiny models gain nothing from threads, and those of processes side by side hinder each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from suite_rules import LONGEST_ID, id_faults, wants_gpu

FAKE_CUDA = None
if os.environ.get("XTUNER_FAKE_CUDA"):  # to walk the tests marked `gpu` where there is no GPU
    from xtuner.testing.fake_cuda import device

    FAKE_CUDA = device.install(2**40)
    if os.environ["XTUNER_FAKE_CUDA"] == "liger":  # with torch's functions in liger's places
        from liger_stub import Stand

        sys.modules.update(Stand().modules)

COMPILED = ("kernels", "fake_cuda")


def pytest_configure(config):
    """Let torch, which is not imported yet, see no GPU: tests that choose a device by themselves
    shall choose as they do anywhere. Ctrl-C, which a background job of a script ignores, works
    again, here and in child processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Refuse ids that could be others in the next run, or in the next process of this one."""
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
    """Random numbers, also those of fixtures, do not depend on the tests before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def fake_cuda():
    """The fake CUDA device, or None."""
    return FAKE_CUDA


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where the CPU kernels and the fake CUDA device lie, so that they are compiled once for all
    tests of all processes (pytest-xdist)."""
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
    """While one process is in here, others wait."""
    import fcntl  # not on Windows

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def cache_at(folder):
    """Let xtuner keep what it keeps in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTUNER_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Names of folders that are not there yet, without end."""
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
    """A run chooses how many threads torch takes."""
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
