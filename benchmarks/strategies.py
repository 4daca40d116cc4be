"""The cost of sharding a model: time, bytes sent and memory under each strategy.

    python benchmarks/strategies.py overhead|scaling|bytes|memory [--steps 8] [--hidden 512]

`overhead`: one process under each strategy beside 'replicated'. `scaling`: two processes with one
core each beside one process with one core, and beside two runs that know nothing of each other,
which is what the machine allows. `bytes`: what two processes send in a step, counted in torch's
collectives, beside theory. `memory`: the peak of one of two processes, beside the forecast. A
random Llama is trained in float32, in full unless `--tuning lora`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

STRATEGIES = ("replicated", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
SETTINGS = """
pretrained_model_name_or_path = "model"
data_path = "rows.jsonl"
dataset_format = "pretrain"
algorithm = "pretrain"
tuning = "{tuning}"
dtype = "float32"
lr = 1e-4
max_length = {length}
accumulative_counts = {accumulation}
max_steps = {steps}
max_epochs = 1000
save_steps = 100000
tensorboard = False
num_threads = 1
custom_hooks = {hooks}
"""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("overhead", "scaling", "bytes", "memory"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M instead")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a micro-batch")
    parser.add_argument("--tuning", default="full", choices=("full", "lora"))
    parser.add_argument("--processes", type=int, default=2, help="of memory")
    parser.add_argument("--rounds", type=int, default=1, help="of which scaling takes the median")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options)
        {"overhead": overhead, "scaling": scaling, "bytes": sent, "memory": memory}[options.what](
            folder, options
        )


def make(folder: Path, options: Any) -> None:
    """Write model and data."""
    from xtuner.testing.tiny import tiny_model_folder

    wide = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    shape = SMOLLM2 if options.smollm2 else {**wide, "num_hidden_layers": options.layers}
    tiny_model_folder(folder / "model", **{"vocab_size": 2048, **shape})
    rows = "\n".join(json.dumps({"text": f"{i} " * 120}) for i in range(400))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")


def start(
    folder: Path, options: Any, strategy: str, *, processes: int, cores: str = "", hook: str = ""
) -> tuple[subprocess.Popen[str], Path]:
    """A run, and its work dir."""
    text = SETTINGS.format(
        steps=options.steps,
        accumulation=options.accumulation,
        length=options.length,
        tuning=options.tuning,
        hooks=[hook] if hook else [],
    )
    (folder / "config.py").write_text(text, encoding="utf-8")
    work = f"run_{len(list(folder.glob('run_*')))}"
    (folder / work).mkdir()
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", "--work-dir", work]
    command += ["--strategy", strategy, *(["--nproc", str(processes)] if processes > 1 else [])]
    pinned = ["taskset", "-c", cores, *command] if cores else command
    pipe = subprocess.PIPE
    made = subprocess.Popen(pinned, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=os.environ)
    return made, folder / work


def result(run: subprocess.Popen[str], work: Path) -> tuple[list[dict[str, Any]], str]:
    """The numbers of each step but the first two, and what the run printed."""
    out, err = run.communicate()
    if run.returncode:
        raise SystemExit(out[-2000:] + err[-2000:])
    (file,) = work.glob("*/scalars.jsonl")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    return [step for step in steps if "loss" in step][2:], out


def run(folder: Path, options: Any, strategy: str, **how: Any) -> tuple[list[dict[str, Any]], str]:
    """`start` a run and wait for its `result`."""
    return result(*start(folder, options, strategy, **how))


def seconds(steps: list[dict[str, Any]]) -> float:
    """Of a step, in the median."""
    return statistics.median(step["seconds"] for step in steps)


def overhead(folder: Path, options: Any) -> None:
    """One process: a step under each strategy."""
    print("| strategy | s a step | of replicated |\n|---|---|---|")
    plain = seconds(run(folder, options, "replicated", processes=1)[0])
    for strategy in options.strategies:
        found = seconds(run(folder, options, strategy, processes=1)[0])
        print(f"| {strategy} | {found:.3f} | {found / plain:.2f} |", flush=True)


def rate(steps: list[dict[str, Any]]) -> float:
    """Tokens per second, in the median."""
    return statistics.median(step["tokens_per_second"] for step in steps)


def scaling(folder: Path, options: Any) -> None:
    """One core, then two with a process each; the work of a process stays the same."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        one = rate(run(folder, options, "replicated", processes=1, cores="0")[0])
        found["one process"].append(one)
        apart = [start(folder, options, "replicated", processes=1, cores=core) for core in "01"]
        found["two runs apart"].append(sum(rate(result(*each)[0]) for each in apart))
        for strategy in options.strategies:
            steps = run(folder, options, strategy, processes=2, cores="0,1")[0]
            found[strategy].append(rate(steps))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    one, apart_rate = medians["one process"], medians["two runs apart"]
    print("| | tokens/s | of one process | of two runs apart |\n|---|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:,.0f} | {value / one:.2f} | {value / apart_rate:.2f} |")


COUNTING_HOOK = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from strategies import counting_hook
Hook = counting_hook({file!r})
"""


def counting_hook(file: str) -> type:
    """A hook that writes the bytes which each kind of collective sends in the last step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from xtuner.engine.hooks.base import BaseHook

    sent: dict[str, float] = defaultdict(float)
    base: Any = TorchDispatchMode

    class Bytes(base):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                kind = func._schema.name.removeprefix("c10d::").strip("_")
                sent[kind] += volume(kind, args)
            return func(*args, **(kwargs or {}))

    class Hook(BaseHook):
        collective = True

        def on_start(self, run: Any) -> None:
            self.mode: Any = Bytes()
            self.mode.__enter__()

        def on_step(self, run: Any) -> None:
            if run.is_main:
                Path(file).write_text(json.dumps(sent), encoding="utf-8")
            sent.clear()
            if run.step == run.total_steps:
                self.mode.__exit__(None, None, None)

    return Hook


def volume(kind: str, args: Any) -> float:
    """Bytes that each of two processes sends, in the mean, with an algorithm that sends least."""
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    sizes = sorted((t.numel() * t.element_size() for t in tensors), reverse=True)
    whole = sizes[0] if sizes else 0
    if kind == "allreduce":
        return float(sum(sizes))  # 2 (N - 1) / N
    if kind in ("allgather", "reduce_scatter") and len(sizes) > 2:
        whole = sum(sizes) - sizes[-1]  # lists of parts, and one part
    return whole / 2  # (N - 1) / N of all parts; a reduce or broadcast sends all in one direction


def theory_of(strategy: str, size: float, micro_batches: int) -> float:
    """What a process sends in a step with rings, up to the factor (N - 1) / N.

    A sum sends everything twice, a reduction into shards or a gather of shards once. Gradients are
    summed per step, or reduced per micro-batch if they are sharded. Weights are gathered once per
    step if only the optimizer state is sharded; otherwise for each forward pass, and for each
    backward pass again unless the strategy keeps so many.

    Args:
        strategy: its name.
        size: of all weights, and of all gradients, in MiB of float32.
        micro_batches: of one process in a step.
    """
    from xtuner.config.schema import Settings
    from xtuner.engine.strategies import division_of

    settings = Settings(pretrained_model_name_or_path="m", data_path="d", strategy=strategy)
    shares = division_of(settings, 2, folder=Path())
    if shares.gradients == 1:
        return 2 * size  # zero1: reduced into shards, and then weights are gathered
    if shares.weights == 1:
        return (micro_batches + 1) * size
    kept = size * 2**18 <= shares.live
    return micro_batches * (2 if kept else 3) * size


def sent(folder: Path, options: Any) -> None:
    """Two processes: bytes of the last step, beside theory."""
    from xtuner.testing.tiny import tiny_model  # noqa: F401 (fails early)

    counted = folder / "bytes.json"
    text = COUNTING_HOOK.format(benchmarks=str(Path(__file__).parent), file=str(counted))
    (folder / "count.py").write_text(text, encoding="utf-8")
    print("| strategy | MiB sent a step | theory | of it |\n|---|---|---|---|")
    for strategy in options.strategies:
        _, out = run(folder, options, strategy, processes=2, hook="count.py:Hook")
        match = re.search(r"([\d,]+) of [\d,]+ are trained", out)
        assert match, out
        size = 4 * int(match[1].replace(",", "")) / 2**20
        half = theory_of(strategy, size, options.accumulation) / 2  # (N - 1) / N
        found = {k: v / 2**20 for k, v in json.loads(counted.read_text()).items()}
        total = sum(found.values())
        parts = ", ".join(f"{kind} {value:.1f}" for kind, value in found.items() if value > 0.05)
        print(f"| {strategy} | {total:.1f} ({parts}) | {half:.1f} | {total / half:.2f} |")


PEAK_HOOK = """
import resource
from pathlib import Path
from xtuner.engine.hooks.base import BaseHook

class Hook(BaseHook):
    def on_step(self, run):
        Path({file!r}).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def memory(folder: Path, options: Any) -> None:
    """The highest resident memory of the main process, beside the forecast."""
    peak = folder / "peak"
    (folder / "peak.py").write_text(PEAK_HOOK.format(file=str(peak)), encoding="utf-8")
    print("| strategy | MiB, measured | forecast | of forecast | parts of the forecast |")
    print("|---|---|---|---|---|")
    for strategy in options.strategies:
        _, out = run(folder, options, strategy, processes=options.processes, hook="peak.py:Hook")
        line = next(line for line in out.splitlines() if line.startswith("Memory"))
        numbers = re.search(r"([\d,]+) MiB at the peak \((.*)\)", line)
        assert numbers, line
        measured, total = float(peak.read_text()), int(numbers[1].replace(",", ""))
        row = f"{measured:,.0f} | {total:,} | {measured / total:.2f} | {numbers[2]}"
        print(f"| {strategy} | {row} |", flush=True)


if __name__ == "__main__":
    main()
