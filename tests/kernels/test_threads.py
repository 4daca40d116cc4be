"""The choice of the number of CPU threads."""

from types import SimpleNamespace

import torch

from xtuner.kernels import threads


def test_the_faster_count_is_chosen_and_both_are_reported(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "matmul_rate", lambda count, dtype: {1: 5e9, 2: 3e9}[count])
    line = threads.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 1
    assert "1 CPU thread" in line and "5 GFLOP/s with 1" in line and "3 GFLOP/s with 2" in line


def test_more_threads_are_chosen_if_rates_are_close(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "matmul_rate", lambda count, dtype: {1: 5e9, 2: 4e9}[count])
    threads.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 2


def test_the_setting_is_used():
    assert "as configured" in threads.choose_threads(3, torch.float32)
    assert torch.get_num_threads() == 3


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    clock = iter([0.0, 0.0625, 1.0, 1.03125, 2.0, 2.125])  # begin and end of each
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert threads.matmul_rate(1, torch.float32, size=128, repeats=3) == 2 * 128**3 * 32


def test_products_that_take_long_are_not_repeated(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert threads.matmul_rate(1, torch.float32, size=128) == 2 * 128**3 / 2


def test_a_single_core_is_not_measured(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.delattr(threads, "matmul_rate")
    assert threads.choose_threads(None, torch.float32) == "1 CPU thread"
