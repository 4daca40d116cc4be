"""Memory that stays: the same for one name and thread, another for each of them."""

import threading

import torch

from xtuner.kernels.scratch import kept, workspace

CPU = torch.device("cpu")


def test_it_is_used_again_and_grows():
    kept.tensors.clear()
    first = workspace("a", 100, torch.float32, CPU)
    assert workspace("a", 40, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert workspace("b", 40, torch.float32, CPU).data_ptr() != first.data_ptr()
    assert len(workspace("a", 300, torch.float32, CPU)) == 300
    assert len(kept.tensors) == 2


def test_another_thread_has_its_own():
    mine, others = workspace("a", 100, torch.float32, CPU), []
    thread = threading.Thread(target=lambda: others.append(workspace("a", 100, torch.float32, CPU)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != mine.data_ptr()
