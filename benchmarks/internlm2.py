"""The first exercise of the course on the shape of InternLM2-1.8B with random weights.

    python benchmarks/internlm2.py [--tokens 128] [--steps 2] [--folder DIR]

Each command of the exercise is a separate process: seconds, the peak of its own memory, and the
peak with the pages of mapped model files, which the system can reclaim. The model
has its original layout (fused wqkv, auto_map, sentencepiece with 92,544 pieces) in bfloat16, 3.8
GB; the settings are those of internlm2_1_8b_qlora_alpaca_e3 with short rows and few steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
WRITE = (
    f"import sys, pathlib; sys.path.insert(0, {str(HELPERS)!r}); "
    "from internlm2_maker import PUBLISHED, write_internlm2; "
    "write_internlm2(pathlib.Path('model'), shape=PUBLISHED)"
)
ROW = {
    "messages": [
        {"role": "user", "content": "请做一下自我介绍"},
        {"role": "assistant", "content": "我是小明的小助手"},
    ]
}
NAME = "internlm2_1_8b_qlora_alpaca_e3"
ASK = ["--ask", "Who are you?", "--max-new-tokens", "8", "--prompt-template", "internlm2_chat"]


def main() -> None:
    """Print one line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="length of a pack")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; it is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="internlm2-") as temporary:
        walk(options.folder or Path(temporary), options)


def walk(folder: Path, options: argparse.Namespace) -> None:
    """Run the exercise in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        measure("write the model", ["-c", WRITE], folder)
    (folder / "rows.json").write_text(json.dumps([ROW] * 200), encoding="utf-8")
    train = ["train", NAME, "--work-dir", "train", "--set"]
    train += ["pretrained_model_name_or_path=model", "data_path=rows.json", "save_steps=1"]
    train += ["dataset_format=openai", "prompt_template=internlm2_chat", "accumulative_counts=1"]
    train += [f"max_length={options.tokens}", f"max_steps={options.steps}", "logging_steps=1"]
    train += ["evaluation_inputs=['Who are you?']", "evaluation_max_new_tokens=8"]
    last = f"train/iter_{options.steps}.pth"
    commands = [
        ("train", [*train, "--overwrite"]),
        ("train --resume", [*train, f"max_steps={options.steps + 1}", "--resume", last]),
        ("chat, base model", ["chat", "model", *ASK]),
        ("chat, run", ["chat", "train", *ASK]),
        ("chat --bits 4, run", ["chat", "train", "--bits", "4", *ASK]),
        ("convert pth_to_hf", ["convert", "pth_to_hf", f"train/{NAME}.py", last, "hf"]),
        ("convert merge", ["convert", "merge", "model", "hf", "final_model"]),
        ("chat, merged model", ["chat", "final_model", *ASK]),
    ]
    for name, words in commands:
        measure(name, ["-m", "xtuner", *words], folder)


def measure(name: str, words: list[str], folder: Path) -> None:
    """Run Python with `words` in `folder`; print time and memory, and keep the output."""
    started, own, resident = time.perf_counter(), 0, 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n$ {name}: {' '.join(words)}\n")
        log.flush()
        process = psutil.Popen([sys.executable, *words], cwd=folder, env=environment,
                               stdout=log, stderr=log)  # fmt: skip
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                own, resident = max(own, memory.rss - memory.shared), max(resident, memory.rss)
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{name} failed; see {folder / 'log.txt'}")
    seconds = time.perf_counter() - started
    print(f"{name:20} {seconds:7.1f} s {own >> 20:7,} {resident >> 20:7,} MiB", flush=True)


if __name__ == "__main__":
    main()
