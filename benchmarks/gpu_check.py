"""Check correctness and speed of xtuner on the GPU of this machine in four minutes.

    python benchmarks/gpu_check.py [--seconds 240] [--only PART ...] [--json FILE] [--markdown FILE]
    python benchmarks/gpu_check.py --tiny [--fake]    dry run on a CPU, or on the fake CUDA device

Needs the dependencies of xtuner but no network: weights are random and the tokenizer is byte-level.
First correctness: losses and gradients of every kind of training against float32 on the CPU, packed
samples against single samples, dequantization, resuming, chat, merging, tests marked `gpu`. Then
speed and memory compared with the forecast, and with TRL if its environment exists (created by
`make bench-gpu`; `--peer-python` names another). Results are written after each part, so that an
interrupted run keeps its results. Work that does not fit into the free GPU memory is reduced or
skipped, as its row says. The exit code is 0 only if all correctness checks pass.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gpucheck import report
from gpucheck.plan import BY_NAME, PARTS
from gpucheck.runner import Outcome, Runner, worker_command, worker_environment

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit of the run")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), help="run only these parts")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu-check.md"))
    parser.add_argument("--work", type=Path, help="folder for models (up to 40 GB)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each timed run")
    parser.add_argument("--peer-python", help="Python interpreter with TRL")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, without meaningful speed"
    )
    parser.add_argument(
        "--fake", action="store_true", help="use the fake CUDA device; needs --tiny"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fake and not options.tiny:
        parser.error("--fake computes on the CPU and needs --tiny")
    return options


def about(options: argparse.Namespace) -> dict[str, str]:
    """The header of the report."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    size = "tiny shapes, speed is not meaningful" if options.tiny else "real shapes"
    system, python = platform.system(), platform.python_version()
    return {
        "commit": found or "unknown",
        "machine": f"{system}, {os.cpu_count()} CPUs, Python {python}",
        "shapes": size + (", on the fake CUDA device" if options.fake else ""),
        "budget": f"{options.seconds:.0f} s",
    }


def work_folder(options: argparse.Namespace) -> Path:
    """Create a folder on the larger file system: models of 14 GB are written and read."""
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 48 * 2**30
    base = options.work or (memory if roomy else disk)
    return Path(tempfile.mkdtemp(prefix="gpu-check-", dir=base))


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; print the report."""
    options = parse(arguments)
    if options.worker:
        from gpucheck.worker import serve

        serve(options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C: clean up the folder
    given = sys.argv[1:] if arguments is None else arguments
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    folder = work_folder(options)
    log = options.markdown.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    runner = Runner(
        worker_command(Path(__file__).resolve(), [*given, "--work", str(folder)]),
        environment=worker_environment(ROOT),
        log=log,
        seconds=options.seconds,
        tell=lambda line: print(line, flush=True),
        slow=10 if options.tiny else 1,
    )
    outcomes: list[Outcome] = []
    facts = about(options)
    text = ""
    try:
        for outcome in runner.run(parts):
            outcomes.append(outcome)
            text = report.write(
                outcomes, about=facts, json_path=options.json, markdown=options.markdown
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{text}\n\nResults are in {options.json} and {options.markdown}, the log in {log}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
