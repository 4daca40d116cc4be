"""Convert the checkpoint of a LLaVA run to its parts, or to one model for other tools.

    iter_N ──copy without training state──► projector/ llm_adapter/ visual_encoder_adapter/
           └─load, merge, assemble──► LlavaForConditionalGeneration + processor + chat template

The merged model needs an embedding row for ``<image>``. If the language model has none, a new row
is the mean of all others, so that its logit is their mean and never the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner import templates
from xtuner.convert.llava_processor import compare_prompts, save_processor, set_stop_tokens
from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.to_hf import LEFT_OUT, write_adapter
from xtuner.convert.weights import (
    Weights,
    cast_plan,
    parse_size,
    total_bytes,
    write_config,
    write_shards,
)
from xtuner.device.select import DTYPES, pick_device
from xtuner.errors import ModelError
from xtuner.hub.links import refuse_links_out
from xtuner.models import manifest
from xtuner.models.load import load_tokenizer, quiet_transformers
from xtuner.models.quantize import Rounding
from xtuner.models.references import same_model
from xtuner.models.run_info import RunInfo
from xtuner.models.vision import folder as parts_of
from xtuner.models.vision.llava import portable_config
from xtuner.models.vision.load import Sources, VisionLanguageModel, load_llava
from xtuner.models.vision.tower import add_image_token
from xtuner.templates.jinja import as_jinja

Log = Callable[[str], None]


def write_parts(
    source: Path,
    save_dir: Path,
    *,
    fp32: bool,
    max_shard_size: str,
) -> None:
    """Write the parts in `source` to `save_dir` as safetensors, in 16 bits unless `fp32`.

    Raises:
        ModelError: The weights of a part are missing or damaged.
        LaunchError: `save_dir` is not empty, or the disk space is insufficient.
    """
    max_bytes = parse_size(max_shard_size)
    manifest.check(source)
    refuse_links_out(source)
    info = RunInfo.read(source)
    dtype = _stored_type(info, fp32)
    folders = (source, *sorted(path for path in source.iterdir() if path.is_dir()))
    parts = {folder: weights for folder in folders if (weights := _weights_in(folder))}
    plans = {folder: cast_plan(weights.stored, dtype) for folder, weights in parts.items()}
    with new_folder(save_dir, num_bytes=sum(map(total_bytes, plans.values()))) as draft:
        for folder, plan in plans.items():
            weights, target = parts[folder], draft / folder.relative_to(source)
            target.mkdir(exist_ok=True)
            if (folder / "adapter_config.json").is_file():
                write_adapter(target, plan, weights)
                continue
            write_shards(target, plan, weights.__getitem__, max_bytes=max_bytes)
            if folder.name != parts_of.PROJECTOR:
                write_config(folder, target, dtype=dtype)
        copy_others(source, draft, skip=LEFT_OUT)
        if info is not None:
            info.without_local_paths().write(draft)


def _weights_in(folder: Path) -> Weights | None:
    """The weights of an adapter, a model or a projector, including pickled ones; None for other
    folders."""
    if (folder / "adapter_config.json").is_file():
        return Weights.of_adapter(folder)
    if folder.name == parts_of.PROJECTOR or (folder / "config.json").is_file():
        return Weights.of_model(folder)
    return None


def models_of(source: Path, *, llm: str, visual_encoder: str, log: Log) -> tuple[str, str]:
    """Names of the language model and vision tower of a run; empty for a model that `source`
    contains.

    Args:
        source: A checkpoint of the run.
        llm, visual_encoder: The values of the settings file; used if the checkpoint names none, or
            names a folder that no longer exists.
        log: Receives a warning if the two differ.
    """
    info = RunInfo.read(source)
    llm = "" if any((source / n).exists() for n in (parts_of.LLM, "config.json")) else llm
    visual_encoder = "" if (source / parts_of.ENCODER).is_dir() else visual_encoder
    if info is None:
        return llm, visual_encoder
    return (
        _trained_on("language model", info.base_model, llm, log),
        _trained_on("vision tower", info.visual_encoder, visual_encoder, log),
    )


def _trained_on(what: str, trained: str, given: str, log: Log) -> str:
    if not trained or not given or same_model(trained, given):
        return given and (trained or given)
    conflict = f"the settings name the {what} {given}, but the checkpoint was trained on {trained}"
    if Path(trained).is_absolute() and not Path(trained).is_dir():
        log(f"Warning: {conflict}, which no longer exists; using {given}.")
        return given
    log(f"Warning: {conflict}; using the latter.")
    return trained


def write_model(
    source: Path,
    save_dir: Path,
    *,
    llm: str = "",
    visual_encoder: str = "",
    fp32: bool = False,
    max_shard_size: str = "2GB",
    trust_remote_code: bool = False,
    trust_code: bool = False,
    log: Log = print,
) -> None:
    """Merge the parts in `source` and write them as one LlavaForConditionalGeneration.

    Args:
        source: A folder of parts, written by this version or by xtuner 0.1.
        save_dir: A new folder.
        llm, visual_encoder: Override those that `source` names.
        fp32: Save in float32 instead of 16 bits.
        max_shard_size: Maximum size of a file, such as '2GB'.
        trust_remote_code: Run Python code that ships with the language model.
        trust_code: Run the Python file that `source` names as its template.
        log: Receives progress messages.

    Raises:
        ModelError: A part is missing or does not fit.
        LaunchError: `save_dir` is not empty, or the disk space is insufficient.
    """
    manifest.check(source)
    refuse_links_out(source)
    info = RunInfo.read(source)
    sources = Sources.of(source, llm=llm, visual_encoder=visual_encoder)
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        source if has_tokenizer else sources.llm, trust_remote_code=trust_remote_code
    )
    add_image_token(tokenizer)
    template = (
        templates.of_checkpoint(
            info.prompt_template, tokenizer, fields=info.template, system=info.system,
            where=str(source), trust_code=trust_code,
        )
        if info
        else templates.load("auto", tokenizer)
    )  # fmt: skip
    rounding = Rounding.of_run(info.settings, info.computed_in) if info else None
    if rounding:
        log(f"The adapter was trained on {rounding.quant_type} weights; dequantizing them.")
    log("Loading the parts and merging adapters ...")
    dtype = _stored_type(info, fp32)
    image_model = load_llava(
        sources, tokenizer, dtype=torch.float32, device=pick_device("auto"),
        rounding=rounding, trust_remote_code=trust_remote_code, merged=True,
    )  # fmt: skip
    model = _self_contained(image_model).to(dtype)
    set_stop_tokens(model, tokenizer, template, log)
    size = sum(p.nbytes for p in model.parameters())
    with new_folder(save_dir, num_bytes=size) as draft:
        with quiet_transformers():
            model.save_pretrained(str(draft), max_shard_size=max_shard_size)
        save_processor(image_model, tokenizer, as_jinja(template, tokenizer), draft)
        compare_prompts(draft, image_model, template, log)
        if info is not None:
            replace(info, kind="model").without_local_paths().write(draft)


def _stored_type(info: RunInfo | None, fp32: bool) -> torch.dtype:
    if fp32:
        return torch.float32
    return DTYPES.get(info.computed_in if info else "", torch.bfloat16)


def _self_contained(image_model: VisionLanguageModel) -> Any:
    """The model with a configuration for plain transformers and an embedding row for ``<image>``.

    Raises:
        ModelError: It has weights that a LlavaForConditionalGeneration cannot store.
    """
    model = image_model.model
    embedding, head = model.get_input_embeddings(), model.lm_head
    if head.bias is not None and head.bias.any():
        raise ModelError(
            "the output head of this language model has a bias, which "
            "LlavaForConditionalGeneration does not support, so the answers would change. "
            "Use --save-format xtuner"
        )
    head.bias = None
    tied = head.weight is embedding.weight
    rows = image_model.image_token_id + 1
    text = portable_config(model.model.language_model)
    if embedding.weight.shape[0] < rows:
        resized = _with_mean_rows(embedding.weight, rows)
        embedding.weight = nn.Parameter(resized, requires_grad=False)
        embedding.num_embeddings = rows
        head.weight = embedding.weight if tied else nn.Parameter(
            _with_mean_rows(head.weight, rows), requires_grad=False
        )  # fmt: skip
        head.out_features = rows
        text.vocab_size = rows
    config = model.config
    config.text_config = text
    config.tie_word_embeddings = tied
    model.model.language_model.config = text
    return model


def _with_mean_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    mean = weight.detach().float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight.detach(), mean.expand(rows - weight.shape[0], -1)])
