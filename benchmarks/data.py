"""Time and memory of data preparation by data size; no training.

    python benchmarks/data.py [--model DIR] [--rows 1000 10000 100000] [--formats jsonl json]

Each size runs twice in separate processes; the second run finds the tokens in the cache. `start` is
the time from opening the files to the packs. Memory is relative to the process with libraries and
tokenizer loaded: the peak up to that point, and after another 500 steps of 16 packs. Tokenizing
worker processes are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu import HOME
from rows import rows

AT_ONCE = 10_000
STEPS = 500


def write(file: Path, count: int) -> None:
    """Write `count` different rows as lines of json or as one array."""
    array = file.suffix == ".json"
    with file.open("w") as out:
        out.write("[\n" if array else "")
        for first in range(0, count, AT_ONCE):
            for number, row in enumerate(rows(min(AT_ONCE, count - first), seed=first), first + 1):
                out.write(json.dumps(row) + (",\n" if array and number < count else "\n"))
        out.write("]\n" if array else "")


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark needs /proc (Linux)")


def measure(file: Path, model: Path) -> None:
    """Build the data of one run, iterate over some of it, and print time and memory."""
    from transformers import AutoTokenizer

    from xtuner import templates
    from xtuner.algorithms.sft import Algorithm
    from xtuner.config.schema import Settings
    from xtuner.data.build import build
    from xtuner.data.collate import concatenate
    from xtuner.data.loader import Loader

    settings = Settings(
        pretrained_model_name_or_path=str(model), data_path=(str(file),), max_length=1024
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = templates.load("auto", tokenizer)
    template.fingerprint()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, began = memory("VmRSS"), time.perf_counter()
    data = build(
        settings,
        template=template,
        tokenizer=tokenizer,
        folder=file.parent,
        algorithm=Algorithm(),
        quiet=True,
        image_layout=None,
    )
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - before
    loader = Loader(
        data.train,
        collate=concatenate,
        batch_size=1,
        accumulative_counts=16,
        seed=0,
        shuffle=True,
    )
    began, packs = time.perf_counter(), 0
    for step, group in enumerate(loader.groups(0, STEPS), 1):
        packs += len(group)
        if step == 10:
            early = memory("VmRSS")
    late = memory("VmRSS")
    result = {
        "start": seconds,
        "peak": peak,
        "grown": late - early,
        "pack": 1000 * (time.perf_counter() - began) / packs,
    }
    print(json.dumps(result))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--formats", nargs="+", default=["jsonl", "json"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.model)
        return
    print("| rows | start | seconds | peak MiB | step 10 to 500, MiB | ms per pack |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XTUNER_CACHE": f"{folder}/cache"}
        for count in options.rows:
            for form in options.formats:
                file = Path(folder) / f"{count}.{form}"
                write(file, count)
                for start in ("first", "second"):
                    command = [sys.executable, __file__, "--measure", str(file)]
                    command += ["--model", str(options.model.resolve())]
                    done = subprocess.run(
                        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                    )
                    found = json.loads(done.stdout.splitlines()[-1])
                    print(
                        f"| {count:,} .{form} | {start} | {found['start']:.1f} | "
                        f"{found['peak']:.0f} | {found['grown']:.0f} | {found['pack']:.2f} |",
                        flush=True,
                    )
                file.unlink()


if __name__ == "__main__":
    main()
