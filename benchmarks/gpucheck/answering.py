"""Measures tokens per second of generation against transformers' generate, and the time of a
merge."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import gpu
import torch

from gpucheck.bench import MB, Bench
from gpucheck.rows import Row, Skip
from gpucheck.speed import Fitting, fitting

PROMPT = "Tell me about the sea, and take your time. " * 3


def _count(bench: Bench) -> int:
    return 8 if bench.tiny else 128


def _chosen(bench: Bench, *, four_bits: bool) -> Fitting:
    """A 7B model, or as many of its layers as fit; a run with a single token needs about as
    much."""
    settings = {"tuning": "qlora" if four_bits else "lora", "lora_r": 8, "max_length": 64}
    return fitting(bench, ("Llama-2-7B",), settings)


def chat_7b(bench: Bench) -> Iterator[Row]:
    """In bfloat16."""
    yield from _chat(bench, four_bits=False)


def chat_7b_nf4(bench: Bench) -> Iterator[Row]:
    """In 4 bits."""
    yield from _chat(bench, four_bits=True)


def chat_7b_compiled(bench: Bench) -> Iterator[Row]:
    """transformers' generate with a compiled model, its default; compiling takes long."""
    if bench.device != "cuda" or bench.options.fake:
        raise Skip("nothing is compiled here")
    chosen = _chosen(bench, four_bits=False)
    yield _generate(bench, chosen, _session(bench, chosen, 16).model, compiled=True)


def _chat(bench: Bench, *, four_bits: bool) -> Iterator[Row]:
    chosen = _chosen(bench, four_bits=four_bits)
    session = _session(bench, chosen, 4 if four_bits else 16)
    kind = "NF4" if four_bits else str(bench.dtype).removeprefix("torch.")
    yield _streamed(bench, f"chat, {kind}, {chosen.name}", session)
    row = _generate(bench, chosen, session.model, compiled=False)
    yield Row(f"{row.name}, {kind}", row.values)


def _session(bench: Bench, chosen: Fitting, bits: int) -> Any:
    from xtuner.chat.opening import open_chat
    from xtuner.generation.generate import GenerationOptions

    device: Any = bench.device
    return open_chat(
        bench.model(chosen.folder, chosen.shape),
        prompt_template="chatml",
        bits=bits,
        device=device,
        options=GenerationOptions(max_new_tokens=_count(bench)),
    )


def _streamed(bench: Bench, name: str, session: Any) -> Row:
    """Tokens per second of a second answer, without its first token; the first answer is the
    warm-up."""
    marks: list[float] = []
    handle = session.model.register_forward_hook(lambda *_: marks.append(bench.synchronize()))
    try:
        for _ in range(2):
            session.reset()
            marks.clear()
            for _ in session.ask(PROMPT):
                pass
    finally:
        handle.remove()
    if len(marks) < 3:
        raise RuntimeError("the random model ended its answer at once")
    rate = (len(marks) - 1) / (marks[-1] - marks[0])
    return Row(name, {**_rate(bench, rate), "note": f"{len(marks)} tokens, batch 1"})


def _generate(bench: Bench, chosen: Fitting, model: Any, *, compiled: bool) -> Row:
    """The same for transformers' generate with a static cache."""
    from transformers import GenerationConfig

    ids = torch.arange(5, 5 + len(PROMPT), device=bench.device)[None] % 250
    count = _count(bench)

    def seconds(new: int) -> float:
        options = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            disable_compile=not compiled,
            pad_token_id=0,
        )
        begun = bench.synchronize()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        return bench.synchronize() - begun

    for _ in range(2 if compiled else 1):
        seconds(count)
    short, long = seconds(count // 4), seconds(count)
    rate = (count - count // 4) / max(1e-9, long - short)
    note = f"static cache, {'compiled' if compiled else 'not compiled'}, {count} tokens, batch 1"
    return Row(f"transformers' generate, {chosen.name}", {**_rate(bench, rate), "note": note})


def _rate(bench: Bench, rate: float) -> dict[str, Any]:
    held = torch.cuda.max_memory_reserved() / MB if bench.device == "cuda" else 0.0
    return {"tokens_per_second": rate, "unit": "tokens/s of an answer", "memory_mib": held}


def merge_7b(bench: Bench) -> Iterator[Row]:
    """Seconds of a merge, including its verification."""
    from xtuner.convert.merge import merge

    settings = {"tuning": "lora", "max_length": 192 if bench.tiny else 512, "max_epochs": 100}
    settings |= {"lora_r": 8} if bench.tiny else {}
    chosen = fitting(bench, ("Llama-2-7B",), settings)
    model = bench.model(chosen.folder, chosen.shape)
    values = {**gpu.COMMON, **settings, "max_steps": 2}
    run = bench.train("to-merge", values, model=model, data=bench.rows_file()).check()
    merged = bench.folder / "merged-7b"
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if size > 0.9 * shutil.disk_usage(bench.folder).free:
        raise Skip(f"{bench.folder} has no space for a second model; choose another with --work")
    bench.free()
    device: Any = bench.device
    begun = time.perf_counter()
    report = merge(model, run.work, merged, device=device, log=lambda line: None)
    seconds = time.perf_counter() - begun
    shutil.rmtree(merged, ignore_errors=True)
    apart = "not compared" if report.relative is None else f"logits {report.relative:.1e} apart"
    note = f"{seconds:.1f} s for {size / 1e9:.1f} GB, {apart}"
    values = {"tokens_per_second": size / 1e9 / seconds, "unit": "GB/s merged", "note": note}
    yield Row(f"merge, {chosen.name}", values)
