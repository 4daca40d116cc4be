"""The dtype of 'auto'."""

import pytest
import torch

from xtuner.device import select


@pytest.mark.parametrize(
    ("device", "bfloat16", "wanted"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
    ids=["Ampere", "Turing", "CPU with", "CPU without"],
)
def test_auto_is_what_the_hardware_multiplies(device, bfloat16, wanted, monkeypatch):
    def supported(including_emulation=True):
        return bfloat16 or including_emulation  # as torch reports for a T4

    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(select, "_cpu_flag", lambda flag: bfloat16)
    assert select.resolve_dtype("auto", device) == wanted
    assert select.resolve_dtype("float16", device) == torch.float16
    assert select.half_dtype(device) == (wanted if device == "cuda" else torch.bfloat16)


def test_missing_gpu_is_assumed_to_have_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select.resolve_dtype("auto", "cuda") == torch.bfloat16
