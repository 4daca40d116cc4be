"""Run the benchmark task with LLaMA-Factory; the last line is JSON with ``tokens_per_second``.

    python benchmarks/peer_llamafactory.py MODEL ROWS.json [--steps 6]

Runs in its own environment. LLaMA-Factory imports torchaudio, which has no build for torch's CPU
wheels; an empty module of that name is enough for text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import sys
import tempfile
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path


def stand_in(name: str) -> None:
    """An empty module `name`."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = module


def main() -> None:
    """Train a few steps and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        stand_in("torchaudio")
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            marks.append((time.perf_counter(), 0))

        def on_step_end(self, args, state, control, **kwargs):
            marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(options.rows, Path(folder) / "rows.json")
        (Path(folder) / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
        run_exp(
            {
                "model_name_or_path": options.model,
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "lora",
                "lora_rank": 64,
                "lora_alpha": 16,
                "lora_target": "all",
                "dataset_dir": folder,
                "dataset": "rows",
                "template": "smollm2",
                "cutoff_len": 1024,
                "packing": True,
                "overwrite_cache": True,
                "output_dir": f"{folder}/out",
                "logging_steps": 1,
                "save_strategy": "no",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant",
                "max_steps": options.steps,
                "bf16": True,
                "use_cpu": True,
                "report_to": "none",
                "include_num_input_tokens_seen": True,
                "disable_gradient_checkpointing": True,
            },
            callbacks=[Clock()],
        )
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens_per_second": rates, "peak_mb": peak}))


if __name__ == "__main__":
    main()
