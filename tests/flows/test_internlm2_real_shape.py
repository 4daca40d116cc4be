"""The shape of InternLM2-1.8B with random weights: a QLoRA step, save, resume, chat, merge."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "internlm2.py"
GIB = 2**30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_exercise_at_its_real_size(tmp_path):
    if psutil.virtual_memory().available < 14 * GIB or shutil.disk_usage(tmp_path).free < 16 * GIB:
        pytest.skip("needs 14 GiB of memory and 16 GiB of disk")
    command = [sys.executable, str(SCRIPT), "--steps", "1", "--tokens", "64", "--folder", "walk"]
    environment = {**os.environ, "XTUNER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    log = tmp_path / "walk" / "log.txt"
    assert done.returncode == 0, log.read_text(encoding="utf-8")[-3000:]
    lines = re.findall(r"^(\S.*?) +[\d.]+ s +([\d,]+) +[\d,]+ MiB$", done.stdout, re.MULTILINE)
    peaks = {name: int(peak.replace(",", "")) for name, peak in lines}
    assert list(peaks)[-2:] == ["convert merge", "chat, merged model"]
    text = log.read_text(encoding="utf-8")
    forecast = int(re.search(r"Memory +([\d,]+) MiB at the peak", text)[1].replace(",", ""))
    assert peaks["train"] < 1.5 * forecast
    assert "Largest logit difference from base + adapter" in text
