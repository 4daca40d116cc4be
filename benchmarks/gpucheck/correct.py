"""Compare results of the GPU with a float32 reference on the CPU.

The reference is transformers with eager attention and PEFT adapters, one sample at a time, with
full logits, and no code of xtuner. Weights are the same: quantized weights are dequantized by
bitsandbytes on the GPU and copied.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpucheck.bench import Bench
from gpucheck.rows import Row, Skip, within
from gpucheck.shapes import HEADS, LAYERS, LENGTHS, batch_of, small_model
from xtuner.config.schema import Settings
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.types import IGNORE_INDEX, Batch

TUNINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuning": "lora"},
    "QLoRA": {"tuning": "qlora"},
    "QLoRA, recomputed": {"tuning": "qlora", "gradient_checkpointing": True},
    "int8": {"tuning": "qlora", "quantization": "int8"},
    "all weights": {"tuning": "full"},
}
ROUNDINGS = 24
"""Number of rounded results per layer, forward and backward."""


def rounding_bound(dtype: torch.dtype, *, layers: int = LAYERS, int8: bool = False) -> float:
    """Allowed error of gradients, relative to their norm.

    A result is rounded by up to u, half of `dtype`'s epsilon. Roundings are independent, so n of
    them add up to u sqrt(n); 1.5 times that is allowed (0.04 in bfloat16; a CPU was 0.009 off).
    LLM.int8() rounds inputs to 1/254 of a row's largest value, which is about four times the
    typical value, in seven matmuls per layer.
    """
    squared = ROUNDINGS * layers * (torch.finfo(dtype).eps / 2) ** 2
    if int8:
        squared += 7 * layers * (4 / 254) ** 2
    return 1.5 * math.sqrt(squared)


def gradients(bench: Bench) -> Iterator[Row]:
    """Loss and gradients of a first step."""
    for heads in HEADS:
        folder = small_model(bench.folder, heads, tiny=bench.tiny)
        for name, changes in TUNINGS.items():
            if heads != next(iter(HEADS)) and name not in ("LoRA", "all weights"):
                continue
            yield from guarded(f"{name}, {heads}", _compared, bench, folder, changes)


def guarded(name: str, function: Any, *arguments: Any) -> Iterator[Row]:
    """Collects the rows of a check; an exception becomes a row that fails."""
    try:
        yield from function(name, *arguments)
    except (Exception, SystemExit) as error:
        first = next(iter(str(error).splitlines()), "")
        yield Row(name, {"found": f"{type(error).__name__}: {first}"[:300]}, passed=False)
        if "CUDA error" in str(error):  # this process is no longer usable
            raise
    gc.collect()


def _compared(name: str, bench: Bench, folder: Path, changes: Mapping[str, Any]) -> Iterator[Row]:
    model = on_card(bench, folder, changes)
    batch = batch_of(LENGTHS)
    wanted = plain_gradients(folder, model, _settings(folder, changes), batch)
    model.train()
    loss = -model(batch.to(bench.device)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    int8 = changes.get("quantization") == "int8"
    found = {n: p.grad for n, p in model.model.named_parameters() if p.requires_grad}
    yield from compare(
        name, (float(loss.detach()), found), wanted, rounding_bound(bench.dtype, int8=int8)
    )


def compare(
    name: str,
    found: tuple[float, Mapping[str, Tensor | None]],
    wanted: tuple[float, Mapping[str, Tensor]],
    bound: float,
) -> Iterator[Row]:
    """Rows for the loss, all gradients together, and the gradient that differs most."""
    loss, right = found[0], wanted[0]
    error = abs(loss - right) / abs(right)
    yield within(f"{name}: loss", error, bound / 20, loss=loss, float32=right)
    if set(found[1]) != set(wanted[1]) or any(g is None for g in found[1].values()):
        other = sorted(set(found[1]) ^ set(wanted[1]))[:3]
        yield Row(f"{name}: gradients", {"found": f"of other names: {other}"}, passed=False)
        return
    pairs = {n: (g.detach().double().cpu(), wanted[1][n].double()) for n, g in found[1].items()}  # type: ignore[union-attr]
    apart = sum(float((a - b).square().sum()) for a, b in pairs.values())
    size = sum(float(b.square().sum()) for _, b in pairs.values())
    yield within(f"{name}: gradients", math.sqrt(apart / size), bound)
    cosines = {n: _cosine(a, b) for n, (a, b) in pairs.items()}
    ratios = {n: float(a.norm() / b.norm()) for n, (a, b) in pairs.items()}
    worst = min(cosines, key=lambda n: cosines[n])
    # A single small gradient loses more precision than all together.
    slack = 2 * bound
    yield within(f"{name}: 1 - cosine of the worst", 1 - cosines[worst], slack**2 / 2, of=worst)
    worst = max(ratios, key=lambda n: abs(ratios[n] - 1))
    yield within(f"{name}: norm of the worst / right - 1", abs(ratios[worst] - 1), slack, of=worst)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


def _settings(folder: Path, changes: Mapping[str, Any]) -> Settings:
    values = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **changes}
    return Settings(pretrained_model_name_or_path=str(folder), data_path="none.json", **values)


def on_card(bench: Bench, folder: Path, changes: Mapping[str, Any]) -> PackedCausalLM:
    """The model as a run creates it, with nonzero adapters (B starts at zero)."""
    s = _settings(folder, changes)
    llm = make_trainable(
        s, dtype=bench.dtype, device=bench.device, recompute=bool(s.gradient_checkpointing is True)
    )
    stir(llm)
    return PackedCausalLM(llm, autocast=llm_autocast(s, bench.dtype))


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Set every adapter's B to fixed random values."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=draw) * 0.02
            parameter.copy_(values.to(parameter.dtype))


def plain_gradients(
    folder: Path, model: PackedCausalLM, s: Settings, batch: Batch
) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients by name, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in dequantised_weights(model.model).items():
            plain.get_submodule(name).weight.copy_(weight)
    if s.uses_adapter:
        plain = _with_adapter(plain, model.model, s)
    total = 0.0
    for sample in batch.split():
        logits = plain(input_ids=sample.input_ids, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(
            logits, sample.labels[0, 1:], reduction="sum", ignore_index=IGNORE_INDEX
        )
        if sample.num_supervised:
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total, {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}


def _with_adapter(plain: Any, model: nn.Module, s: Settings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=s.lora_r, lora_alpha=s.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(plain, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name].float().cpu())
    return adapted


def dequantised_weights(model: nn.Module) -> dict[str, Tensor]:
    """Float32 values of quantized layers on the CPU, dequantized by bitsandbytes, by layer name
    without adapters."""
    from bitsandbytes.functional import dequantize_4bit

    found = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            values = dequantize_4bit(weight.data, state).float().cpu()
        elif getattr(weight, "CB", None) is not None:
            values = (weight.CB.float() * weight.SCB[:, None].float() / 127).cpu()
        else:
            continue
        found[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = values
    return found


def isolation(bench: Bench) -> Iterator[Row]:
    """Compare samples in one row with the same samples alone, and run the training's own check."""
    for heads in HEADS:
        folder = small_model(bench.folder, heads, tiny=bench.tiny)
        for name in ("LoRA", "QLoRA", "all weights"):
            yield from guarded(f"{name}, {heads}", _isolated, bench, folder, TUNINGS[name])


def _isolated(name: str, bench: Bench, folder: Path, changes: Mapping[str, Any]) -> Iterator[Row]:
    model = on_card(bench, folder, changes)
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=1)
    first = LENGTHS[0]
    other.input_ids[:, first:] = batch.input_ids[:, first:]
    before, again, after = (_states(model, b, bench) for b in (batch, batch, other))
    noise = float((before - again).abs().max())
    moved = float((before - after)[:, first:].abs().max())
    yield within(f"{name}: another first sample changes the others by", moved, noise)
    stays = float((before - after)[:, :first].abs().max())
    yield Row(f"{name}: and itself", {"found": stays, "allowed": "more than 0"}, passed=stays > 0)
    alone = torch.cat([_states(model, sample, bench) for sample in batch.split()], dim=1)
    apart = float((before - alone).norm() / alone.norm())
    yield within(f"{name}: packed - alone", apart, rounding_bound(bench.dtype))
    note = model.verify()
    yield Row(f"{name}: verify of a run", {"found": note or "no complaint"}, passed=True)


def _states(model: PackedCausalLM, batch: Batch, bench: Bench) -> Tensor:
    """Hidden states, computed as in training."""
    model.train()
    with torch.autocast(bench.device, dtype=model.autocast, enabled=model.autocast is not None):
        return model.hidden_states(batch.to(bench.device)).detach().float().cpu()


def dequantise(bench: Bench) -> Iterator[Row]:
    """Compare 4-bit weights dequantized by bitsandbytes, by xtuner and by the formula."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from xtuner.kernels.four_bit import dequantized

    shapes = [(256, 512), (96, 4304), (130, 192)] if not bench.tiny else [(16, 128), (6, 80)]
    if bench.options.fake:  # it uses bitsandbytes' CPU functions, which misread such rows
        shapes = [shape for shape in shapes if shape[-1] % 64 == 0]
    for kind in ("nf4", "fp4"):
        for double in (True, False):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                apart: list[int] = []
                for shape in shapes:
                    values = (torch.randn(shape) / 8).to(bench.device, dtype)
                    packed, state = quantize_4bit(
                        values, blocksize=64, compress_statistics=double, quant_type=kind
                    )
                    ours = dequantized(packed, state)
                    right = by_formula(packed, state).to(dtype)
                    apart.append(int((ours.cpu() != right).sum()))
                    if bench.device == "cuda":  # on a CPU, bitsandbytes misreads some shapes
                        theirs = dequantize_4bit(packed, state).view(shape)
                        apart[-1] += int((ours != theirs).sum())
                name = f"{kind}{', double' if double else ''}, {str(dtype)[6:]}: values not equal"
                yield within(name, sum(apart), 0)


def by_formula(packed: Tensor, state: Any) -> Tensor:
    """``code[nibble] * scale`` in float32 on the CPU; the same for scales of double
    quantization."""
    scales = state.absmax.cpu()
    if state.nested:
        inner = state.state2
        codes, blocks = inner.code.cpu().float()[scales.long()], inner.absmax.cpu().float()
        scales = codes * blocks.repeat_interleave(inner.blocksize)[: len(codes)]
        scales = scales + state.offset.cpu().float()
    both = packed.cpu().view(torch.uint8).flatten()
    nibbles = torch.stack([both >> 4, both & 15], dim=1).flatten()[: state.shape.numel()]
    values = state.code.cpu().float()[nibbles.long()]
    spread = scales.float().repeat_interleave(state.blocksize)[: len(values)]
    return (values * spread).view(state.shape)


def llava_gradients(bench: Bench) -> Iterator[Row]:
    """Compare both stages of LLaVA with xtuner's own results in float32 on the CPU."""
    from gpucheck.images import STAGES, built, small_llava

    if bench.device == "cpu" and not bench.tiny:
        raise Skip("there is no GPU")
    base_dir = small_llava(bench)
    for name, changes in STAGES.items():
        yield from guarded(f"LLaVA, {name}", _compared_llava, bench, base_dir, changes, built)


def _compared_llava(
    name: str, bench: Bench, base_dir: Path, changes: Mapping[str, Any], built: Any
) -> Iterator[Row]:
    found, batch = built(base_dir, changes, bench.device, bench.dtype)
    wanted, _ = built(base_dir, changes, "cpu", torch.float32)
    stir(found)
    values = {n: p for n, p in found.named_parameters() if p.requires_grad}
    results = []
    for model, device in ((found, bench.device), (wanted, "cpu")):
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(values[n].to(p.device, p.dtype))
        model.train()
        loss = -model(batch.to(device)).sum()
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((float(loss.detach()), grads))
    layers = LAYERS + 3  # the tower's too
    yield from compare(name, results[0], results[1], rounding_bound(bench.dtype, layers=layers))
