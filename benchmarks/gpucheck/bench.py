"""Shared by all parts in a worker: the device, models on disk, in-process `xtuner train`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu
import torch
from cpu import read_scalars, write_config
from operations import matmul_rate
from rows import rows

from gpucheck.rows import Enough, Skip

MB = 2**20


@dataclass(frozen=True)
class Trained:
    """A run of `xtuner train`.

    Attributes:
        code: The exit code.
        text: The printed output.
        steps: The numbers of every step.
        held: MiB of GPU memory that torch held before the run.
        work: Its work dir.
    """

    code: int
    text: str
    steps: list[dict[str, Any]]
    work: Path
    held: float

    def line(self, beginning: str) -> str:
        """The rest of the first printed line with this beginning."""
        found = (line for line in self.text.splitlines() if line.startswith(beginning))
        return next(found, "").removeprefix(beginning).strip()

    def check(self) -> Trained:
        """Return self; raise RuntimeError if the run failed."""
        if self.code:
            said = [line for line in self.text.splitlines() if line.strip()]
            raise RuntimeError(f"xtuner train: exit code {self.code}: {' / '.join(said[-4:])}")
        return self


@dataclass
class Bench:
    """The state of a worker.

    Attributes:
        options: The command-line options.
        folder: Folder for models and runs, shared by all workers of a check.
        device: 'cuda', or 'cpu' if there is no GPU.
    """

    options: argparse.Namespace
    folder: Path
    device: str
    rate: float | None = field(default=None)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Bench:
        """Create the state from the command-line options."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and not options.tiny:
            raise SystemExit("torch finds no GPU; use --tiny for a dry run without one")
        return cls(options, Path(options.work), device)

    @property
    def tiny(self) -> bool:
        """Whether small shapes are used."""
        return bool(self.options.tiny)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of this device: bfloat16, or float16 on a GPU without bfloat16."""
        if self.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.bfloat16

    def free(self) -> None:
        """Release torch's cached GPU memory, and reset the peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def free_memory(self) -> int:
        """Free bytes of GPU memory; a very large number without a GPU."""
        return int(torch.cuda.mem_get_info()[0]) if self.device == "cuda" else 2**50

    def rate_of_card(self) -> float:
        """Operations per second of a matmul in `dtype`, measured once."""
        if self.rate is None:
            self.rate = matmul_rate(256 if self.tiny else 8192, dtype=self.dtype)
            gpu.free_card()
        return self.rate

    def synchronize(self) -> float:
        """Wait for the GPU, then return the clock's seconds."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def model(self, name: str, shape: Mapping[str, Any], *, positions: int = 4096) -> Path:
        """The folder of a model with random weights, created once.

        Raises:
            Skip: The disk has no space for it.
        """
        base_dir = self.folder / "models" / name
        done = base_dir / "done"
        if not done.exists():
            size = 2 * parameters_of(shape)
            self.folder.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(self.folder).free
            if size > 0.9 * room:
                raise Skip(
                    f"{self.folder} has no room for {size / 1e9:.0f} GB; choose another with --work"
                )
            shutil.rmtree(base_dir, ignore_errors=True)
            base_dir.mkdir(parents=True)
            gpu.make_model(base_dir, dict(shape), positions=positions)
            done.touch()
        return base_dir

    def rows_file(self, count: int = 999) -> Path:
        """Instruction rows with Alpaca's lengths."""
        file = self.folder / f"rows-{count}.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows(count)))
        return file

    def train(
        self, name: str, settings: Mapping[str, Any], *arguments: str, model: Path, data: Path
    ) -> Trained:
        """Run `xtuner train` in this process, in the folder `name`.

        Args:
            name: Name of the run; the same name continues or restarts that run, depending on
                `arguments`.
            settings: Settings in addition to those of gpu.py.
            arguments: Command-line arguments.
            model: The model to train.
            data: The file of rows.
        """
        from xtuner.cli.app import main

        base_dir = self.folder / "runs" / name
        base_dir.mkdir(parents=True, exist_ok=True)
        given = argparse.Namespace(model=model, data=data)
        values = {**gpu.COMMON, "device": self.device, **settings}
        config, work = write_config(values, base_dir, given), base_dir / "work"
        again = () if "--resume" in arguments else ("--overwrite",)
        text = io.StringIO()
        self.free()
        held = torch.cuda.memory_reserved() / MB if self.device == "cuda" else 0.0
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                code = main(["train", str(config), "--work-dir", str(work), *again, *arguments])
            except Enough:
                code = 0
        found = list(work.glob("*/scalars.jsonl"))
        print(text.getvalue())  # for the log
        return Trained(code, text.getvalue(), read_scalars(work) if found else [], work, held)


def parameters_of(shape: Mapping[str, Any]) -> int:
    """Number of weights of a Llama with an untied output head."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    return int(shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * hidden)
