"""Scratch memory is reused per name and thread."""

import threading

import torch

from xtuner.kernels.scratch import buffers, scratch_buffer

CPU = torch.device("cpu")


def test_it_is_reused_and_grows():
    buffers.tensors.clear()
    first = scratch_buffer("a", 100, torch.float32, CPU)
    assert scratch_buffer("a", 40, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert scratch_buffer("b", 40, torch.float32, CPU).data_ptr() != first.data_ptr()
    assert len(scratch_buffer("a", 300, torch.float32, CPU)) == 300
    assert len(buffers.tensors) == 2


def test_another_thread_has_its_own():
    mine, others = scratch_buffer("a", 100, torch.float32, CPU), []
    thread = threading.Thread(
        target=lambda: others.append(scratch_buffer("a", 100, torch.float32, CPU))
    )
    thread.start()
    thread.join()
    assert others[0].data_ptr() != mine.data_ptr()
