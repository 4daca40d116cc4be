"""How OpenMP threads should wait for each other: spinning, spinning briefly, or sleeping.

    python benchmarks/waiting.py [--threads 2]

Times a small and a large matrix product in a process for each setting. Run it on an idle machine,
and next to other busy processes: spinning threads take the cores from the threads they wait for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

SETTINGS: dict[str, dict[str, str]] = {
    "default of libgomp": {},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(threads: int) -> None:
    """Print milliseconds per product."""
    import time

    import torch

    torch.set_num_threads(threads)
    weight = torch.randn(576, 1536)
    for rows, repeats in ((64, 600), (1024, 40)):
        left = torch.randn(rows, 576)
        torch.mm(left, weight)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, weight)
        print(
            f"  {rows:5} rows {(time.perf_counter() - start) / repeats * 1e3:8.2f} ms", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.threads)
        return
    print(f"load average {os.getloadavg()[0]:.1f}, {options.threads} threads")
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    for name, values in SETTINGS.items():
        print(name, flush=True)
        arguments = [sys.executable, __file__, "--measure", "--threads", str(options.threads)]
        subprocess.run(arguments, env={**clean, **values}, check=True)


if __name__ == "__main__":
    main()
