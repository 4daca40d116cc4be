"""Tokens per second and memory of training, compared with the forecast."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu
import torch
from cpu import work_of
from memory import IMAGES, make_images
from transformers import LlamaConfig

from gpucheck import hooks
from gpucheck.bench import MB, Bench, Trained
from gpucheck.rows import Row, Skip
from xtuner.config.schema import Settings
from xtuner.memory.plan import MemoryPlan, plan_memory

WARM = 4
PAGED = {"paged_optimizer": True}
"""Settings for a GPU with little memory."""
ENOUGH = f"{hooks.__file__}:EnoughHook"
SHAPES = {
    "Llama-2-7B": gpu.LLAMA_7B,
    "InternLM2-1.8B": gpu.INTERNLM2_1_8B,
    "Llama-3.1-8B": gpu.LLAMA31_8B,
}
TINY_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 1, "image_size": 56, "patch_size": 14}  # fmt: skip


@dataclass(frozen=True)
class Fitting:
    """A shape that fits into the free GPU memory.

    Attributes:
        name: Name of the model, with the number of layers if it is reduced.
        shape: Fields of its configuration.
        settings: The run's settings.
        plan: Its forecast.
        note: What was changed to make it fit; empty otherwise.
    """

    name: str
    shape: dict[str, Any]
    settings: dict[str, Any]
    plan: MemoryPlan
    note: str

    @property
    def folder(self) -> str:
        """For its weights."""
        return self.name.replace(" ", "-").replace(",", "")

    def memory(self, measured: float) -> dict[str, float]:
        """Columns of a row, in MiB."""
        expected = self.plan.forecast.peak / MB
        found = {"memory_mib": measured, "forecast_mib": expected}
        return found | ({"forecast_ratio": expected / measured} if measured else {})


def fitting(bench: Bench, names: tuple[str, ...], settings: Mapping[str, Any]) -> Fitting:
    """The first model that fits completely, otherwise the last one with fewer layers.

    Raises:
        Skip: An eighth of its layers does not fit either.
    """
    shapes = [(name, 1) for name in names] + [(names[-1], part) for part in (2, 4, 8)]
    for name, part in shapes:
        shape = dict(gpu.TINY if bench.tiny else SHAPES[name])
        layers = shape["num_hidden_layers"]
        shape["num_hidden_layers"] = max(1, layers // part)
        label = "tiny" if bench.tiny else name
        label += "" if part == 1 else f", {layers // part} of {layers} layers"
        config = bench.folder / "configs" / label.replace(" ", "-").replace(",", "")
        LlamaConfig(**shape, max_position_embeddings=2**17).save_pretrained(config)
        given = {"data_path": str(bench.rows_file()), **gpu.COMMON, **settings}
        wanted = Settings(**{**given, "pretrained_model_name_or_path": str(config)})
        plan = plan_memory(wanted, bench.device)
        if plan.fits:
            note = "" if part == 1 else "fewer layers, or it would not fit"
            if plan.forecast.recompute and settings.get("gradient_checkpointing") is not True:
                note += f"{'; ' if note else ''}activations recomputed, or it would not fit"
            return Fitting(label, shape, dict(settings), plan, note)
    raise Skip(
        f"{names[-1]} with an eighth of its layers takes {plan.forecast.peak / MB:,.0f} MiB, and "
        f"{plan.memory / MB:,.0f} are free"
    )


def _small(bench: Bench, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with short rows on a fake device."""
    short = {"max_length": 192, "lora_r": 8} if bench.tiny else {}
    return {**settings, **short, "max_epochs": 100}


def _row(bench: Bench, name: str, chosen: Fitting, run: Trained, **more: Any) -> Row:
    """Rates of a run, over the steps after the first few."""
    steps = run.steps[WARM : bench.options.steps] or run.steps
    rates = [step["tokens_per_second"] for step in steps]
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    values = {
        "tokens_per_second": statistics.median(rates),
        "slow_quarter": quartiles[0],
        "fast_quarter": quartiles[2],
        "step_ms": 1e3 * statistics.median(step["seconds"] for step in steps),
        "data_ms": 1e3 * statistics.median(step["data_seconds"] for step in steps),
        "unit": "tokens/s",
        "computing": run.line("Computing"),
        "notes": " / ".join(line for line in run.text.splitlines() if line.startswith("Note")),
        "held_before_mib": run.held,
        "note": chosen.note,
        **chosen.memory(max(step["memory_mb"] for step in run.steps)),
    }
    return Row(f"{name}, {chosen.name}", {**values, **more})


def _text(bench: Bench, name: str, models: tuple[str, ...], settings: Mapping[str, Any],
          **more: Any) -> tuple[Fitting, Trained, Row]:  # fmt: skip
    """Train on rows of text with `settings` and `more`, which does not affect the forecast."""
    settings = _small(bench, settings)
    chosen = fitting(bench, models, settings)
    model, data = bench.model(chosen.folder, chosen.shape), bench.rows_file()
    steps = {"max_steps": bench.options.steps + 1, "custom_hooks": (ENOUGH,)}
    values = {**settings, **steps, "logging_steps": 1, **more}
    run = bench.train(name.split(",")[0].replace(" ", "-"), values, model=model, data=data).check()
    given = argparse.Namespace(model=model, data=data)
    work = work_of(given, lora=settings["tuning"] != "full", **{**gpu.COMMON, **settings})
    row = _row(bench, name, chosen, run)
    share = work.total * row.values["tokens_per_second"] / bench.rate_of_card()
    return chosen, run, Row(row.name, {**row.values, "utilization": share})


def _profiled(
    bench: Bench, name: str, models: tuple[str, ...], settings: Mapping[str, Any]
) -> Iterator[Row]:
    """A run and a profile of its last steps."""
    watchers = (ENOUGH, f"{hooks.__file__}:ProfileHook")
    steps = bench.options.steps + hooks.STEPS + 1
    _, run, row = _text(bench, name, models, settings, custom_hooks=watchers, max_steps=steps)
    yield row
    found = json.loads((run.work / hooks.FILE).read_text())
    profiled = [step["seconds"] for step in run.steps[-hooks.STEPS + 1 :]]
    yield Row(
        row.name,
        {
            "profile": {
                "wall ms a step, not profiled": row.values["step_ms"],
                "wall ms a step, profiled": 1e3 * statistics.median(profiled),
                "device busy, ms per step": found["busy_ms"],
                "device busy, share of an unprofiled step": found["busy_ms"]
                / row.values["step_ms"],
                "kernel launches per step": found["launches"],
                "synchronizations per step": found["waits"],
                "host operations, ms per step": found["host_ms"],
            },
            "kernels": found["kernels"],
            "host_operations": found["host_operations"],
        },
    )


def lora_1_8b(bench: Bench) -> Iterator[Row]:
    """LoRA on the small model."""
    settings = gpu.CASES["lora_1_8b"].settings
    yield from _profiled(bench, "LoRA 4096", ("InternLM2-1.8B",), settings)


def lora_1_8b_plain(bench: Bench) -> Iterator[Row]:
    """The same without CUDA graphs."""
    settings = {**gpu.CASES["lora_1_8b"].settings, "cuda_graphs": False}
    yield from _profiled(bench, "LoRA 4096 without graphs", ("InternLM2-1.8B",), settings)


def qlora_7b(bench: Bench) -> Iterator[Row]:
    """QLoRA as on an 8 GB GPU."""
    yield from _profiled(bench, "QLoRA 2048", ("Llama-2-7B",), {**gpu.QLORA, **PAGED})


def qlora_7b_plain(bench: Bench) -> Iterator[Row]:
    """The same without CUDA graphs."""
    settings = {**gpu.QLORA, **PAGED, "cuda_graphs": False}
    yield from _profiled(bench, "QLoRA 2048 without graphs", ("Llama-2-7B",), settings)


def lora_7b(bench: Bench) -> Iterator[Row]:
    """LoRA on a 7B model."""
    yield from _profiled(bench, "LoRA 7B 4096", ("Llama-2-7B",), gpu.LORA)


def full_1_8b(bench: Bench) -> Iterator[Row]:
    """Full fine-tuning of the small model."""
    settings = {"tuning": "full", "max_length": 4096}
    yield _text(bench, "all weights 4096", ("InternLM2-1.8B",), settings)[2]


def llava_stage_1(bench: Bench) -> Iterator[Row]:
    """The projector alone."""
    yield from _llava(bench, "LLaVA stage 1", {"tuning": "full", "freeze_llm": True})


def llava_stage_2(bench: Bench) -> Iterator[Row]:
    """LoRA on the language model and the tower."""
    yield from _llava(bench, "LLaVA stage 2", {"tuning": "lora", "visual_encoder_lora_r": 64})


def _llava(bench: Bench, name: str, changes: Mapping[str, Any]) -> Iterator[Row]:
    base_dir = bench.folder / "llava"
    base_dir.mkdir(parents=True, exist_ok=True)
    made = make_images(base_dir, TINY_TOWER) if bench.tiny else make_images(base_dir)
    batch = 1 if bench.tiny else 4
    settings = _small(bench, {**IMAGES, **changes, **made, "batch_size": batch})
    chosen = fitting(bench, ("Llama-2-7B", "InternLM2-1.8B"), settings)
    model = bench.model(chosen.folder, chosen.shape)
    steps = {"max_steps": bench.options.steps + 1, "custom_hooks": (ENOUGH,)}
    values = {**settings, **steps}
    run = bench.train(
        name.replace(" ", "-"), values, model=model, data=Path(made["data_path"])
    ).check()
    row = _row(bench, name, chosen, run)
    images = batch / (row.values["step_ms"] / 1e3)
    note = "; ".join(filter(None, (chosen.note, f"{images:.1f} images/s, {batch} per step")))
    yield Row(row.name, {**row.values, "images_per_second": images, "note": note})


LIMIT = 8 * 2**30
"""Bytes of GPU memory for the search of the longest row."""


def longest_8b(bench: Bench) -> Iterator[Row]:
    """The longest row for QLoRA on an 8B model, r=32, in 8 GiB: rows grow until memory runs out."""
    first, last, step = (64, 256, 64) if bench.tiny else (2048, 12288, 512)
    lengths = list(range(first, last + 1, step))
    data = bench.folder / "growing.json"
    data.write_text(json.dumps([_row_of(n) for n in lengths]))
    settings = {
        **gpu.QLORA,
        "lora_r": 32,
        "optim_type": "PagedAdamW8bit",
        "embedding_on_cpu": True,
        **PAGED,
        "pack_to_max_length": False,
        "shuffle": False,
        "max_length": 2 * last,
        "max_steps": len(lengths) + 1,
        "max_epochs": 2,
        "custom_hooks": (ENOUGH,),
        "prompt_template": "chatml",
    }
    name = "tiny" if bench.tiny else "Llama-3.1-8B"
    shape = dict(gpu.TINY if bench.tiny else gpu.LLAMA31_8B)
    model = bench.model(name, shape, positions=4 * last)
    bench.free()
    note = _limit(bench)
    try:
        run = bench.train("longest", settings, model=model, data=data)
    finally:
        _limit(bench, undo=True)
    if not run.steps:
        run.check()
        raise RuntimeError("no step was finished")
    if "memory" not in run.text[-2000:].lower():  # an error here had another reason
        run.check()
    tokens = [round(s["tokens_per_second"] * s["seconds"]) for s in run.steps]
    best = max(tokens)
    ending = f"a row of {step} more did not fit" if run.code else "no longer row was tried"
    note = f"{note}; {ending}"
    values = {
        "tokens_per_second": float(best),
        "unit": "tokens of the longest row",
        "memory_mib": max(s["memory_mb"] for s in run.steps),
        "note": note,
    }
    yield Row(f"QLoRA r=32 in 8 GiB, {name}", values)


def _row_of(tokens: int) -> dict[str, str]:
    """A row of about `tokens` bytes, most of them supervised."""
    text = ("a longer answer. " * (tokens // 17 + 1))[: max(1, tokens - 64)]
    return {"instruction": "Go on.", "input": "", "output": text}


def _limit(bench: Bench, *, undo: bool = False) -> str:
    """Limit torch to 8 GiB minus CUDA's own memory, and report both."""
    if bench.device != "cuda" or bench.options.fake:
        return "no limit here"
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    allowed = total if undo else min(total, LIMIT - min(context, 2**30))
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    return f"torch may hold {allowed / MB:,.0f} MiB, CUDA itself {context / MB:,.0f}"
