"""How soon the page of `xtuner web` shows something, and when it can be used, in chromium.

    python benchmarks/first_paint.py [--rounds 5] [--width 1280]

Starts the page with a tiny model in a temporary folder, and opens it in a new browser profile
(cold) and again in the same one (warm). Milliseconds from the navigation's start; the median of the
rounds, and the slowest. Needs Debian's chromium and playwright (extra `browser`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from xtuner.testing.tiny import tiny_model_folder

_PAINT = """() => Object.fromEntries(
    performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime]))"""
_COLUMNS = ("first paint", "first text", "controls", "model")


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """`xtuner web` with a tiny model; its address."""
    model = tiny_model_folder(folder / "tiny")
    words = ["web", str(model), "--port", "0", "--runs", str(folder / "runs"), "--device", "cpu"]
    command = [sys.executable, "-m", "xtuner.cli.app", *words]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield re.findall(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.terminate()


def opened(page: Page, address: str) -> dict[str, float]:
    """Open the page, and return how long each part took."""
    started = time.monotonic()
    page.goto(address, wait_until="commit")
    page.wait_for_selector("#question textarea")
    controls = 1000 * (time.monotonic() - started)
    page.wait_for_selector("h2.model")
    model = 1000 * (time.monotonic() - started)
    paint = page.evaluate(_PAINT)
    values = (paint["first-paint"], paint["first-contentful-paint"], controls, model)
    return dict(zip(_COLUMNS, values, strict=True))


def measured(rounds: int, width: int) -> dict[str, list[dict[str, float]]]:
    """The times of all rounds, of new and used profiles."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as address:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        options: dict[str, Any] = {"executable_path": chromium}
        options["args"] = ["--no-sandbox"] if os.geteuid() == 0 else []
        with sync_playwright() as playwright:
            for _ in range(rounds):
                browser = playwright.chromium.launch(**options)
                context = browser.new_context(viewport={"width": width, "height": 860})
                for profile in found:
                    page = context.new_page()
                    found[profile].append(opened(page, address))
                    page.close()
                browser.close()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1280)
    given = parser.parse_args()
    print("| profile | " + " | ".join(_COLUMNS) + " |")
    print("|---|" + "---|" * len(_COLUMNS))
    for profile, rounds in measured(given.rounds, given.width).items():
        cells = []
        for column in _COLUMNS:
            times = [one[column] for one in rounds]
            cells.append(f"{statistics.median(times):,.0f} ({max(times):,.0f})")
        print(f"| {profile} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
