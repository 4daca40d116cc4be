"""Training speed and start time for 1,000 to 1,000,000 rows.

    python benchmarks/scale.py [--model DIR] [--rows 1000 10000 100000 1000000] [--steps 8]

Every size runs twice; the second run finds the tokens in the cache. `start` is the time from the
command to the first step, including imports, data and model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from cpu import HOME, run_xtuner
from rows import rows

AT_ONCE = 10_000


def write(file: Path, count: int) -> None:
    """Write `count` different rows as lines of json."""
    with file.open("w") as out:
        for first in range(0, count, AT_ONCE):
            for row in rows(min(AT_ONCE, count - first), seed=first):
                out.write(json.dumps(row) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    options.model = options.model.resolve()
    print("| rows | start, s | tokens/s | waiting for data | peak MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XTUNER_CACHE"] = f"{folder}/cache"
        for count in options.rows:
            options.data = Path(folder) / f"{count}.jsonl"
            write(options.data, count)
            for start in ("first", "cached"):
                began = time.perf_counter()
                steps, peak = run_xtuner({"tuning": "lora"}, Path(folder), options)
                before = time.perf_counter() - began - sum(step["seconds"] for step in steps)
                rate = statistics.median(step["tokens_per_second"] for step in steps[2:])
                waits = statistics.median(s["data_seconds"] / s["seconds"] for s in steps[2:])
                print(
                    f"| {count:,} ({start}) | {before:.0f} | {rate:.0f} | {100 * waits:.2f} % | "
                    f"{peak:,.0f} |",
                    flush=True,
                )
            options.data.unlink()


if __name__ == "__main__":
    main()
