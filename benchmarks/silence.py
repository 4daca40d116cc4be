"""The longest silences of a command whose output goes to a pipe.

    python benchmarks/silence.py [--over SECONDS] COMMAND ...

Prints each pause without output of more than 3 seconds (`--over`), with the output before it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--over", type=float, default=3.0, help="seconds")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    started = last = time.monotonic()
    longest, seen = 0.0, b""
    with subprocess.Popen(
        options.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout
        while True:
            piece = os.read(process.stdout.fileno(), 65536)
            now = time.monotonic()
            longest = max(longest, now - last)
            if now - last > options.over:
                before = seen.decode(errors="replace").strip().rpartition("\n")[2]
                print(f"{now - last:6.1f} s silent, from {last - started:6.1f} s, after {before!r}")
            if not piece:
                break
            last, seen = now, seen[-500:] + piece
    print(f"{now - started:.1f} s in all, {longest:.1f} s the longest silence")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
