"""Compare xtuner with TRL on one GPU, with random weights in the shapes of real models.

    python benchmarks/gpu.py [--rounds 2] [--steps 20] [--only qlora_7b ...] [--tiny]

Nothing is downloaded: weights, tokenizer and rows are generated (20 GB of disk for 7B). xtuner is
`xtuner train`; TRL runs in its own environment with default attention, with flash attention, and
with Liger kernels; failed runs are listed with their reason. Memory is the peak reserved by torch.
Utilization is relative to a bfloat16 product of 8,192 x 8,192, measured before every run. `--tiny`
runs everything with small shapes, also on a CPU, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cpu import HERE, HOME, Result, python_of, run, run_xtuner, work_of
from operations import matmul_rate
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
LLAMA31_8B = {
    **LLAMA_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@dataclass(frozen=True)
class Case:
    """One task: a model shape, settings of xtuner, and the goal.

    `recomputes` lists whether the peer recomputes activations; both are tried if it has two values.
    """

    shape: dict
    settings: dict
    recomputes: tuple[bool, ...]
    goal: str


QLORA = {
    "tuning": "qlora",
    "optim_type": "PagedAdamW32bit",
    "max_length": 2048,
    "gradient_checkpointing": True,
}
LORA = {"tuning": "lora", "max_length": 4096}
CASES = {
    "qlora_llama2_7b": Case(
        LLAMA_7B, QLORA, (True,), "at most 6,656 MiB; 1.3 x TRL at equal or less memory"
    ),
    "qlora_internlm2_7b": Case(
        INTERNLM2_7B,
        {**QLORA, "embedding_on_cpu": True},
        (True,),
        "at most 6,656 MiB; 1.3 x TRL at equal or less memory",
    ),
    "lora_1_8b": Case(INTERNLM2_1_8B, LORA, (False,), "1.3 x TRL"),
    "lora_7b": Case(LLAMA_7B, LORA, (False, True), "1.3 x the faster TRL; 45 % of the GPU's rate"),
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
    "TRL, liger": ("--liger",),
    "TRL, flash attention": ("--attention", "kernels-community/flash-attn2"),
    "TRL, flash attention, liger": (
        *("--attention", "kernels-community/flash-attn2"),
        "--liger",
    ),
}


def make_model(folder: Path, shape: dict, *, positions: int = 4096) -> None:
    """Write a Llama of `shape` with random weights and a tokenizer of bytes.

    Weights are drawn on the GPU and written in parts, so that a GPU with 8 GB can create a model of
    14 GB.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from xtuner.testing.tiny import tiny_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**shape, max_position_embeddings=positions, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for number, names in enumerate(shards({n: 2 * x.numel() for n, x in wanted.items()})):
        file = f"model-{number:05}.safetensors"
        made = {}
        for name in names:
            kept = torch.empty(wanted[name].shape, dtype=torch.bfloat16, device=device)
            made[name] = kept.fill_(1) if kept.ndim == 1 else kept.normal_(0, 0.02)
        save_file({n: x.cpu() for n, x in made.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        del made
    total = sum(2 * x.numel() for x in wanted.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    tiny_tokenizer().save_pretrained(folder)
    free_card()


def shards(sizes: dict[str, int], most: int = 2**30) -> list[list[str]]:
    """Names in groups of at most `most` bytes, in order; a larger one is a group of its own."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def free_card() -> None:
    """Release this process's GPU memory: the runs are separate processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rate_of_card() -> float:
    """Current operations per second: a GPU slows down as it warms up."""
    rate = matmul_rate(size=8192 if torch.cuda.is_available() else 1024)
    free_card()
    return rate


def peers_of(case: Case) -> dict[str, list[str]]:
    """Names and options of the peer's runs."""
    options = ["--max-length", str(case.settings["max_length"])]
    options += ["--four-bit"] if case.settings["tuning"] == "qlora" else []
    return {
        f"{peer}, recomputing" if recompute else peer: [
            *(*options, *extra),
            *(["--checkpointing"] if recompute else []),
        ]
        for peer, extra in PEERS.items()
        for recompute in case.recomputes
    }


def run_peer(extra: list[str], base_dir: Path, options: argparse.Namespace) -> dict | str:
    """The measurements of the peer's run, or why it failed, in one line."""
    python = getattr(options, "peer_python", None) or python_of("trl")
    command = [python, str(HERE / "peer_trl.py"), str(options.model)]
    command += [str(options.data), "--steps", str(options.steps), *extra]
    try:
        text, _ = run(command, base_dir)
    except SystemExit as error:  # a kernel is missing, or memory ran out
        return str(error).strip().splitlines()[-1][:200].replace("|", "/")
    return json.loads(text.strip().splitlines()[-1])


def compare(name: str, case: Case, base_dir: Path, options: argparse.Namespace) -> None:
    """Print the lines of one case."""
    options.model = base_dir / name
    make_model(options.model, case.shape)
    settings, peers = {**COMMON, **case.settings}, peers_of(case)
    ours, theirs, failed, machine = Result(), {peer: Result() for peer in peers}, {}, []
    for _ in range(options.rounds):
        for peer, extra in peers.items():
            machine.append(rate_of_card())
            steps, _ = run_xtuner(settings, base_dir, options)
            peak = max(step["memory_mb"] for step in steps)
            ours.add([step["tokens_per_second"] for step in steps], peak)
            machine.append(rate_of_card())
            result = run_peer(extra, base_dir, options)
            if isinstance(result, str):
                failed[peer] = result
            else:
                theirs[peer].add(result["tokens_per_second"], result["peak_mb"])
    work = work_of(options, lora=True, **settings)
    share = work.total * ours.median / statistics.median(machine)
    print(f"| {name} | **xtuner** | {ours.median:,.0f} | | {ours.peak_mb:,.0f} | {share:.0%} |")
    for peer, other in theirs.items():
        if other.rates:
            ratio = ours.median / other.median
            line = f"{other.median:,.0f} | {ratio:.2f} | {other.peak_mb:,.0f} | |"
            print(f"| {name} | {peer} | {line}")
        if peer in failed:
            print(f"| {name} | {peer} | failed: {failed[peer]} | | | |")
    if best := max((other.median for other in theirs.values() if other.rates), default=0.0):
        print(f"| {name} | fastest of these | {best:,.0f} | {ours.median / best:.2f} | | |")
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
        cases = {name: replace(case, shape=TINY) for name, case in cases.items()}
    elif not torch.cuda.is_available():
        sys.exit("no GPU found; --tiny is a dry run without one")
    what = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{what}, torch {torch.__version__}\n")
    print("| task | program | tokens/s | speedup of xtuner | peak MiB | utilization |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=HOME if HOME.exists() else None) as folder:
        options.data = Path(folder) / "rows.json"
        options.data.write_text(json.dumps(rows(999)))
        for name, case in cases.items():
            compare(name, case, Path(folder), options)


if __name__ == "__main__":
    main()
