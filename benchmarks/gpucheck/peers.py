"""Runs TRL on the same task, if an environment with TRL exists; nothing is installed."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
from cpu import HOME

from gpucheck.bench import Bench
from gpucheck.rows import Row, Skip
from gpucheck.speed import fitting


def lora_1_8b(bench: Bench) -> Iterator[Row]:
    """As `speed.lora_1_8b`."""
    yield from _peers(bench, "lora_1_8b", "InternLM2-1.8B", against="lora_1_8b")


def qlora_7b(bench: Bench) -> Iterator[Row]:
    """As `speed.qlora_7b`."""
    yield from _peers(bench, "qlora_llama2_7b", "Llama-2-7B", against="qlora_7b")


def lora_7b(bench: Bench) -> Iterator[Row]:
    """As `speed.lora_7b`."""
    yield from _peers(bench, "lora_7b", "Llama-2-7B", against="lora_7b")


def _python(bench: Bench) -> str:
    """The interpreter that has TRL.

    Raises:
        Skip: There is none.
    """
    named = bench.options.peer_python
    found = Path(named) if named else HOME / "bench/trl/bin/python"
    if not found.exists():
        raise Skip(f"{found} does not exist: run `make bench-gpu`, or set --peer-python")
    return str(found)


def _peers(bench: Bench, name: str, model: str, *, against: str) -> Iterator[Row]:
    """Rates of every way to run the peer; `against` is xtuner's part with the same task."""
    python, case = _python(bench), gpu.CASES[name]
    chosen = fitting(bench, (model,), {**case.settings, "max_epochs": 100})
    options = argparse.Namespace(
        model=bench.model(chosen.folder, chosen.shape),
        data=bench.rows_file(),
        steps=bench.options.steps,
        peer_python=python,
    )
    bench.free()
    peers = gpu.peers_of(case)
    # the best that works offline: flash attention kernels need the hub
    for peer in (peer for peer in peers if "liger" in peer and "flash" not in peer):
        result: Any = gpu.run_peer(peers[peer], bench.folder, options)
        if isinstance(result, str):
            yield Row(f"{peer}, {chosen.name}", {"note": f"failed: {result}"})
            continue
        values = {
            "tokens_per_second": statistics.median(result["tokens_per_second"][2:]),
            "unit": "tokens/s",
            "against": against,
            "memory_mib": result["peak_mb"],
            "note": f"{name}; {chosen.note}".strip("; "),
        }
        yield Row(f"{peer}, {chosen.name}", values)
