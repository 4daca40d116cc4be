"""Whether xtuner is right, and how fast it is, on the GPU of this machine, in four minutes.

    python benchmarks/gpu_check.py [--seconds 240] [--only PART ...] [--json FILE] [--markdown FILE]
    python benchmarks/gpu_check.py --tiny [--fake]    walk it all on a CPU, or on a fake CUDA device

Needs xtuner's dependencies and nothing of the network: weights are random and made here, and the
tokenizer is one of bytes. First what must be right: losses and gradients of every kind of training
against float32 on the CPU, packed samples against the same alone, dequantisation, resuming, chat,
merging, tests marked `gpu`. Then speed and memory beside the forecast, and TRL's where its
environment is (`make bench-gpu` makes it; `--peer-python` names another). Results are written after
each part, so that a run that is cut off tells what it has found. What does not fit the card's free
memory is made smaller or left out, and the row says so. The exit code is 0 only where all that must
be right is.
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
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), help="only these parts")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu-check.md"))
    parser.add_argument("--work", type=Path, help="where models are made (up to 40 GB)")
    parser.add_argument("--steps", type=int, default=12, help="of each training that is timed")
    parser.add_argument("--peer-python", help="an interpreter that has TRL")
    parser.add_argument("--tiny", action="store_true", help="small shapes; says nothing of speed")
    parser.add_argument("--fake", action="store_true", help="on a fake CUDA device; needs --tiny")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fake and not options.tiny:
        parser.error("--fake computes on the CPU: it goes with --tiny")
    return options


def about(options: argparse.Namespace) -> dict[str, str]:
    """What the report says first."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    size = "tiny shapes: nothing here says anything about speed" if options.tiny else "real shapes"
    system, python = platform.system(), platform.python_version()
    return {
        "commit": found or "not known",
        "machine": f"{system}, {os.cpu_count()} CPUs, Python {python}",
        "shapes": size + (", on a fake CUDA device" if options.fake else ""),
        "budget": f"{options.seconds:.0f} s",
    }


def work_folder(options: argparse.Namespace) -> Path:
    """A new folder where the most room is: models of 14 GB are written and read there."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: clear the folder up
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
    print(
        f"\n{text}\n\nWritten to {options.json} and {options.markdown}; what was said is in {log}"
    )
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
