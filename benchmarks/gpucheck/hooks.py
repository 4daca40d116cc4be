"""Hooks for `xtuner train`: one profiles the last steps, one ends the run without a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from gpucheck.rows import Enough
from xtuner.engine.hooks.base import BaseHook, Run

STEPS = 3
MOST = 15
FILE = "profile.json"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class EnoughHook(BaseHook):
    """Ends the run one step before the last, which would write a checkpoint."""

    order = 99

    def on_step(self, run: Run) -> None:
        """End it."""
        if run.step == run.total_steps - 1:
            raise Enough


class ProfileHook(BaseHook):
    """Profiles the last `STEPS` steps before `EnoughHook` ends the run.

    Profiling slows them down, so their speed is not meaningful.
    """

    order = 1

    def __init__(self) -> None:
        self._profile: Any = None

    def on_step(self, run: Run) -> None:
        """Start and stop the profiler."""
        if run.step == run.total_steps - 1 - STEPS:
            self._profile = profile(activities=supported_activities())
            self._profile.start()
        elif run.step == run.total_steps - 1 and self._profile is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profile.stop()
            found = summary(self._profile.key_averages())
            (run.work_dir / FILE).write_text(json.dumps(found))

    def close(self) -> None:
        """Discard what was recorded."""
        self._profile = None


def _is_on(event: Any, device: str) -> bool:
    return str(event.device_type).endswith(device)


def summary(events: Any) -> dict[str, Any]:
    """Sums and the largest entries per step. `busy_ms` adds up the time of kernels and copies;
    concurrent ones count twice.
    """
    kernels = [e for e in events if _is_on(e, "CUDA")]
    host = [e for e in events if _is_on(e, "CPU")]

    def calls(names: tuple[str, ...]) -> float:
        return sum(e.count for e in host if e.key.startswith(names)) / STEPS

    def largest(some: list[Any], field: str) -> list[tuple[str, float, float]]:
        ordered = sorted(some, key=lambda e: getattr(e, field), reverse=True)[:MOST]
        return [(e.key, getattr(e, field) / 1e3 / STEPS, e.count / STEPS) for e in ordered]

    return {
        "busy_ms": sum(e.self_device_time_total for e in kernels) / 1e3 / STEPS,
        "host_ms": sum(e.self_cpu_time_total for e in host) / 1e3 / STEPS,
        "launches": calls(LAUNCHES),
        "waits": calls(WAITS),
        "kernels": largest(kernels, "self_device_time_total"),
        "host_operations": largest(host, "self_cpu_time_total"),
    }
