"""xtuner beside TRL on one GPU, with random weights in the shapes of real models.

    python benchmarks/gpu.py [--rounds 2] [--steps 20] [--only qlora_7b ...] [--tiny]

Nothing is downloaded: weights, tokenizer and rows are made here (20 GB of disk for the 7B). xtuner
is the real `xtuner train`; TRL runs in its own environment with its best kernels, once with and
once without liger. Memory is the highest that torch reserved. `--tiny` walks the whole way with
small shapes, on a CPU too, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from cpu import HERE, HOME, python_of, run, run_xtuner
from operations import matmul_rate, needed
from rows import rows

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
INTERNLM2_7B = {
    **LLAMA_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
}
INTERNLM2_1_8B = {
    **INTERNLM2_7B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


@dataclass(frozen=True)
class Case:
    """One work: a shape, settings of xtuner, options of the peer, and what is to be reached."""

    shape: dict
    settings: dict
    peer: tuple[str, ...]
    goal: str


QLORA = {"tuning": "qlora", "optim_type": "PagedAdamW32bit", "max_length": 2048}
LORA = {"tuning": "lora", "max_length": 4096}
CASES = {
    "qlora_llama2_7b": Case(
        LLAMA_7B,
        QLORA,
        ("--four-bit", "--checkpointing", "--max-length", "2048"),
        "at most 6,656 MiB; 1.3 x TRL at equal or less memory",
    ),
    "qlora_internlm2_7b": Case(
        INTERNLM2_7B,
        QLORA,
        ("--four-bit", "--checkpointing", "--max-length", "2048"),
        "at most 6,656 MiB; 1.3 x TRL at equal or less memory",
    ),
    "lora_1_8b": Case(INTERNLM2_1_8B, LORA, ("--max-length", "4096"), "1.3 x TRL"),
    "lora_7b": Case(
        LLAMA_7B,
        LORA,
        ("--max-length", "4096", "--checkpointing"),
        "1.3 x TRL; 45 % of the card's rate",
    ),
}
COMMON = {
    "pack_to_max_length": True,
    "batch_size": 1,
    "accumulative_counts": 1,
    "lr": 2e-4,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
}
PEERS = {
    "TRL": (),
    "TRL, flash attention": ("--attention", "kernels-community/flash-attn2"),
    "TRL, flash attention, liger": (
        *("--attention", "kernels-community/flash-attn2"),
        "--liger",
    ),
}


def make_model(folder: Path, shape: dict) -> None:
    """Write a Llama of `shape` with random weights and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from xtuner.testing.tiny import tiny_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**shape, max_position_embeddings=4096), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def share_of_card(case: Case, options: argparse.Namespace, rate: float, machine: float) -> float:
    """Part of the card's rate over the operations that the job needs; a row is one sample here."""
    shape, length = case.shape, case.settings["max_length"]
    work = needed(
        hidden=shape["hidden_size"],
        inner=shape["intermediate_size"],
        layers=shape["num_hidden_layers"],
        heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        vocabulary=shape["vocab_size"],
        lora_r=64,
        lengths=[length],
        supervised=length,
    )
    return work.body * rate / machine


def compare(name: str, case: Case, place: Path, options: argparse.Namespace) -> None:
    """Print the lines of one case."""
    options.model = place / name
    make_model(options.model, case.shape)
    found: dict[str, list[float]] = {"xtuner": []}
    memory: dict[str, float] = {}
    machine = matmul_rate(size=8192 if torch.cuda.is_available() else 1024)
    for _ in range(options.rounds):
        for peer, extra in PEERS.items():
            steps, _ = run_xtuner({**COMMON, **case.settings}, place, options)
            found["xtuner"] += [step["tokens_per_second"] for step in steps[2:]]
            memory["xtuner"] = max(step["memory_mb"] for step in steps)
            command = [python_of("trl"), str(HERE / "peer_trl.py"), str(options.model)]
            command += [str(options.data), "--steps", str(options.steps), *case.peer, *extra]
            try:
                text, _ = run(command, place)
            except SystemExit as error:  # a kernel that this card or environment lacks
                print(f"  {peer}: {str(error).splitlines()[-1]}", file=sys.stderr)
                continue
            result = json.loads(text.strip().splitlines()[-1])
            found.setdefault(peer, []).extend(result["tokens_per_second"][2:])
            memory[peer] = result["peak_mb"]
    ours = statistics.median(found["xtuner"])
    share = share_of_card(case, options, ours, machine)
    print(f"| {name} | **xtuner** | {ours:,.0f} | | {memory['xtuner']:,.0f} | {share:.0%} |")
    for peer in PEERS:
        if peer in found:
            rate = statistics.median(found[peer])
            print(f"| {name} | {peer} | {rate:,.0f} | {ours / rate:.2f} | {memory[peer]:,.0f} | |")
    print(f"| {name} | goal: {case.goal} | | | | |", flush=True)
    subprocess.run(["rm", "-r", str(options.model)], check=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.only}
    if options.tiny:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
        cases = {
            name: Case({**small, **heads}, case.settings, case.peer, case.goal)
            for name, case in cases.items()
        }
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here; --tiny walks the way without one")
    what = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{what}, torch {torch.__version__}\n")
    print("| work | program | tokens/s | xtuner is faster by | peak MiB | of the card's rate |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=HOME if HOME.exists() else None) as folder:
        options.data = Path(folder) / "rows.json"
        options.data.write_text(json.dumps(rows(999)))
        for name, case in cases.items():
            compare(name, case, Path(folder), options)


if __name__ == "__main__":
    main()
