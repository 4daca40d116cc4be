"""How many CPU threads compute."""

import pytest
import torch

from xtuner.kernels import threads


@pytest.fixture(autouse=True)
def same_threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_faster_count_is_taken_and_both_are_told(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "matmul_rate", lambda count, dtype: {1: 5e9, 2: 3e9}[count])
    line = threads.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 1
    assert "1 CPU thread" in line and "5 GFLOP/s with 1" in line and "3 GFLOP/s with 2" in line


def test_more_threads_are_taken_where_products_hardly_tell(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "matmul_rate", lambda count, dtype: {1: 5e9, 2: 4e9}[count])
    threads.choose_threads(None, torch.float32)
    assert torch.get_num_threads() == 2


def test_a_setting_is_obeyed():
    assert "as set" in threads.choose_threads(3, torch.float32)
    assert torch.get_num_threads() == 3


def test_the_rate_is_a_rate():
    assert 1e8 < threads.matmul_rate(1, torch.float32, size=128) < 1e14
