"""Compare xtuner with other trainers on two cores: tokens/s, peak memory, hardware utilization.

    python benchmarks/cpu.py [--data ROWS.json] [--model DIR] [--rounds 2] [--steps 8]
        [--only lora ...] [--peers TRL ...]

Results of xtuner come from `xtuner train` with logging, read from its scalars.jsonl. Peers run in
their own environments (created by `make bench`). In each round xtuner runs before every peer, so
that both see the same load of a shared machine; ratios are of medians over all steps except the
first two of each run. Utilization is relative to a bfloat16 product of 2,048 x 2,048, measured
before every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from operations import Work, matmul_rate, needed
from rows import rows

HERE = Path(__file__).parent
HOME = Path(os.environ.get("XTUNER_HOME", Path.home() / ".cache/xtuner"))
COMMON = {
    "max_length": 1024,
    "pack_to_max_length": True,
    "batch_size": 1,
    "accumulative_counts": 1,
    "lr": 2e-4,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "optim_type": "AdamW",
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
}
HEADER = """| task | program | tokens/s | speedup of xtuner | goal | peak MiB | utilization |
|---|---|---|---|---|---|---|"""
WORKS: dict[str, tuple[dict, list[tuple[str, str, list[str], str]]]] = {
    # settings of xtuner; peers: name, environment, script and options, goal
    "lora": (
        {"tuning": "lora"},
        [
            ("TRL, bfloat16 weights", "trl", ["peer_trl.py"], "2.5"),
            ("TRL, default types", "trl", ["peer_trl.py", "--default-dtype"], "4.0"),
            ("TRL, defaults", "trl", ["peer_trl.py", "--default-dtype", "--checkpointing"], ""),
            ("LLaMA-Factory", "llamafactory", ["peer_llamafactory.py"], "2.0"),
        ],
    ),
    "qlora": (
        {"tuning": "qlora"},
        [("transformers + peft + bitsandbytes", "own", ["peer_plain.py"], "1.5")],
    ),
    "full": (
        {"tuning": "full"},
        [("TRL, full fine-tuning", "trl", ["peer_trl.py", "--tuning", "full"], "1.5")],
    ),
}


@dataclass
class Result:
    """Rates of all timed steps and the peak memory of one program."""

    rates: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.rates)

    def add(self, rates: list[float], peak_mb: float) -> None:
        """Add the steps of one run, except the first two, which are warmup."""
        self.rates += rates[2:]
        self.peak_mb = max(self.peak_mb, peak_mb)


def python_of(environment: str) -> str:
    """The interpreter of a peer's environment."""
    if environment == "own":
        return sys.executable
    python = HOME / "bench" / environment / "bin/python"
    if not python.exists():
        sys.exit(f"{python} is missing: run `make bench`, which creates the peers' environments")
    return str(python)


def run(command: list[str], cwd: Path) -> tuple[str, float]:
    """Run to the end; return its output and its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as out:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return text, usage.ru_maxrss / 1024


def run_xtuner(
    settings: dict, base_dir: Path, options: argparse.Namespace, through: tuple[str, ...] = ()
) -> tuple[list[dict], float]:
    """Train with the command line, run by the module `through` if there is one; return the scalars
    of every step and the peak memory."""
    config = write_config({"max_steps": options.steps, **settings}, base_dir, options)
    work = base_dir / "work"
    command = [sys.executable, "-m", *through, "xtuner.cli.app", "train", str(config)]
    _, peak = run([*command, "--work-dir", str(work), "--overwrite"], base_dir)
    return read_scalars(work), peak


def write_config(settings: dict, base_dir: Path, options: argparse.Namespace) -> Path:
    """Write a settings file: COMMON, model and data of `options`, and `settings` over them."""
    config = base_dir / "bench.py"
    values = {
        **COMMON,
        "pretrained_model_name_or_path": str(options.model),
        "data_path": str(options.data),
        "save_steps": 10**6,
        **settings,
    }
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return config


def read_scalars(work: Path) -> list[dict]:
    """The numbers of every step of the newest start in a work dir."""
    newest = max(work.glob("*/scalars.jsonl"), key=lambda file: file.stat().st_mtime)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def work_of(options: argparse.Namespace, lora: bool, **changes: object) -> Work:
    """Count the operations of this data set and model; `changes` are further settings."""
    from transformers import AutoConfig

    from xtuner.config.load import load_settings
    from xtuner.training.data_parts import DataParts

    of_run = {"pretrained_model_name_or_path": str(options.model), "data_path": str(options.data)}
    loaded = load_settings({**COMMON, "tuning": "lora", **changes, **of_run})
    data = DataParts.open(loaded).build(quiet=True)
    packs = [data.train[i] for i in range(len(data.train))]
    config = AutoConfig.from_pretrained(options.model)
    return needed(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        lora_r=COMMON["lora_r"] if lora else None,
        lengths=[len(sample.input_ids) for pack in packs for sample in pack],
        supervised=data.train.num_supervised,
    )


def compare(name: str, options: argparse.Namespace, base_dir: Path) -> list[str]:
    """Run one task with xtuner and its peers; return the rows of the table."""
    settings, peers = WORKS[name]
    peers = [p for p in peers if any(word in p[0] for word in options.peers)]
    ours, theirs = Result(), {peer: Result() for peer, *_ in peers}
    machine, waits = [], []
    for _ in range(options.rounds):
        for peer, environment, script, _ in peers:
            machine.append(matmul_rate())
            steps, peak = run_xtuner(settings, base_dir, options)
            ours.add([s["tokens_per_second"] for s in steps], peak)
            waits += [s["data_seconds"] / s["seconds"] for s in steps[2:]]
            command = [python_of(environment), str(HERE / script[0]), str(options.model)]
            command += [str(options.data), *script[1:], "--steps", str(options.steps)]
            machine.append(matmul_rate())
            text, peak = run(command, base_dir)
            theirs[peer].add(json.loads(text.strip().splitlines()[-1])["tokens_per_second"], peak)
            print(f"  {peer}: {theirs[peer].median:.0f}; xtuner {ours.median:.0f}", flush=True)
    rate, work = statistics.median(machine), work_of(options, lora=name != "full")
    share = work.total * ours.median / rate
    lines = [f"| {name} | **xtuner** | **{ours.median:.0f}** | | | {ours.peak_mb:,.0f} | |"]
    for peer, _, _, goal in peers:
        other = theirs[peer]
        lines.append(
            f"| {name} | {peer} | {other.median:.0f} | {ours.median / other.median:.2f} | {goal} | "
            f"{other.peak_mb:,.0f} | {ours.peak_mb / other.peak_mb:.2f} |"
        )
    print(
        f"{name}: the machine multiplies {rate / 1e9:.0f} GFLOP/s (bfloat16, 2,048 x 2,048, median "
        f"of {len(machine)}); a token needs {work.total / 1e6:.0f} MFLOP "
        f"(matrices {work.body / 1e6:.0f}, attention {work.attention / 1e6:.0f}, "
        f"head {work.head / 1e6:.0f}): xtuner reaches {100 * share:.0f} % of it; "
        f"it waits {100 * statistics.median(waits):.2f} % of a step for data"
    )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--peers", nargs="+", default=[""], help="substrings of their names")
    options = parser.parse_args()
    for name in options.only:
        known = [peer for peer, *_ in WORKS[name][1]]
        if not any(word in peer for word in options.peers for peer in known):
            parser.error(
                f"--peers: no peer of {name} matches; allowed are parts of {', '.join(known)}"
            )
    with tempfile.TemporaryDirectory() as folder:
        base_dir = Path(folder)
        if options.data is None:
            options.data = base_dir / "rows.json"
            options.data.write_text(json.dumps(rows(999)))
        options.data, options.model = options.data.resolve(), options.model.resolve()
        lines = [HEADER]
        for name in options.only:
            lines += compare(name, options, base_dir)
            print("\n".join(["", *lines, ""]), flush=True)


if __name__ == "__main__":
    main()
