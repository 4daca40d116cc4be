"""Turn the checkpoint of a LLaVA run into its parts, or into one whole model that others read.

    iter_N ──copy, without what resuming needs──► projector/ llm_adapter/ visual_encoder_adapter/
           └─load, merge, assemble──► LlavaForConditionalGeneration + processor + chat template

A whole model needs a row of the embedding for ``<image>``. Where the language model has none, it
gets the mean of all rows, whose logit is the mean of all others and so never the largest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from xtuner import templates
from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.to_hf import LEFT_OUT, find_checkpoint, same_base, write_adapter
from xtuner.convert.weights import (
    Weights,
    cast_plan,
    main_dtype,
    parse_size,
    total_bytes,
    write_config,
    write_shards,
)
from xtuner.data.images.expansion import expand
from xtuner.device.select import DTYPES, pick_device
from xtuner.errors import CheckpointError, ModelError
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_tokenizer, located, quiet_transformers, read_config
from xtuner.models.old_adapters import fitting_encoder_adapter
from xtuner.models.quantize import Rounding
from xtuner.models.run_info import RunInfo
from xtuner.models.vision import folder as parts_of
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.llava import portable_config
from xtuner.models.vision.load import Sources, VisionLanguageModel, load_llava
from xtuner.models.vision.tower import add_image_token, load_vision_tower, strategy_of
from xtuner.templates.base import Template
from xtuner.templates.jinja import as_jinja
from xtuner.types import IMAGE, Message

Tell = Callable[[str], None]


def write_parts(
    source: Path,
    save_dir: Path,
    *,
    fp32: bool = False,
    max_shard_size: str = "2GB",
    tell: Tell = lambda line: None,
) -> RunInfo | None:
    """Write the parts in `source` to `save_dir` as safetensors, in 16 bits unless `fp32`.

    Raises:
        ModelError: a part lacks its weights, or they are damaged.
        LaunchError: `save_dir` is taken, or the disk is too full.
    """
    max_bytes = parse_size(max_shard_size)
    info = RunInfo.read(source)
    dtype = _stored_type(info, fp32)
    folders = (source, *sorted(path for path in source.iterdir() if path.is_dir()))
    held = {folder: weights for folder in folders if (weights := _weights_in(folder))}
    plans = {folder: cast_plan(weights.stored, dtype) for folder, weights in held.items()}
    with new_folder(save_dir, num_bytes=sum(map(total_bytes, plans.values()))) as draft:
        for folder, plan in plans.items():
            weights, place = held[folder], draft / folder.relative_to(source)
            place.mkdir(exist_ok=True)
            if (folder / "adapter_config.json").is_file():
                write_adapter(place, plan, weights)
                continue
            write_shards(place, plan, weights.__getitem__, max_bytes=max_bytes, tell=tell)
            if folder.name != parts_of.PROJECTOR:
                write_config(folder, place, dtype=dtype)
        copy_others(source, draft, skip=LEFT_OUT)
    return info


def _weights_in(folder: Path) -> Weights | None:
    """The weights of an adapter, a model or a projector, pickled ones too; None for other
    folders."""
    if (folder / "adapter_config.json").is_file():
        return Weights.of_adapter(folder)
    if folder.name == parts_of.PROJECTOR or (folder / "config.json").is_file():
        return Weights.of_model(folder)
    return None


def models_of(source: Path, *, llm: str, visual_encoder: str, tell: Tell) -> tuple[str, str]:
    """Language model and vision tower that a run was trained on; empty where it trained them, so
    that `source` holds them.

    Args:
        source: its checkpoint.
        llm, visual_encoder: what a settings file says; taken where the checkpoint says nothing, or
            names a folder that is gone.
        tell: gets a warning where the two differ.
    """
    info = RunInfo.read(source)
    llm = "" if any((source / n).exists() for n in (parts_of.LLM, "config.json")) else llm
    visual_encoder = "" if (source / parts_of.ENCODER).is_dir() else visual_encoder
    if info is None:
        return llm, visual_encoder
    return (
        _trained_on("language model", info.base_model, llm, tell),
        _trained_on("vision tower", info.visual_encoder, visual_encoder, tell),
    )


def _trained_on(what: str, trained: str, given: str, tell: Tell) -> str:
    if not trained or not given or same_base(trained, given):
        return given and (trained or given)
    told = f"the settings name the {what} {given}, but the checkpoint was trained on {trained}"
    if Path(trained).is_absolute() and not Path(trained).is_dir():
        tell(f"Warning: {told}, which is not there any more: {given} is taken.")
        return given
    tell(f"Warning: {told}, which is taken.")
    return trained


def write_whole(
    source: Path,
    save_dir: Path,
    *,
    llm: str = "",
    visual_encoder: str = "",
    prompt_template: str | None = None,
    fp32: bool = False,
    max_shard_size: str = "2GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust_remote_code: bool = False,
    tell: Tell = print,
) -> RunInfo | None:
    """Write the model whose parts are in `source` as one LlavaForConditionalGeneration.

    Args:
        source: a folder of parts, of ours or of xtuner 0.1.
        save_dir: a new folder.
        llm, visual_encoder: in place of those that `source` names.
        prompt_template: in place of the one that `source` names.
        fp32: keep float32 instead of 16 bits.
        max_shard_size: of the files, such as '2GB'.
        device: where it is computed.
        trust_remote_code: run Python code that lies beside the language model.
        tell: gets lines of progress.

    Raises:
        ModelError: a part is missing or does not fit.
        LaunchError: `save_dir` is taken, or the disk is too full.
    """
    info = RunInfo.read(source)
    sources = Sources.of(source, llm=llm, visual_encoder=visual_encoder)
    own = (source / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        source if own else sources.llm, trust_remote_code=trust_remote_code
    )  # fmt: skip
    add_image_token(tokenizer)
    name = prompt_template or (info.prompt_template if info else "auto")
    system = info.system if info else ""
    template = templates.load(name, tokenizer, system=system)
    rounding = Rounding.of_run(info.settings, info.computed_in) if info else None
    if rounding:
        tell(f"The adapter was trained beside {rounding.quant_type} weights: they are dequantised.")
    tell("Loading the parts, and merging adapters ...")
    dtype = _stored_type(info, fp32)
    image_model = load_llava(
        sources, tokenizer, dtype=torch.float32, device=pick_device(device),
        rounding=rounding, trust_remote_code=trust_remote_code, merged=True,
    )  # fmt: skip
    model = _self_contained(image_model).to(dtype)
    _stop_as_in_chat(model, tokenizer, template, tell)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with new_folder(save_dir, num_bytes=size) as draft:
        with quiet_transformers():
            model.save_pretrained(str(draft), max_shard_size=max_shard_size)
        _save_processor(image_model, tokenizer, as_jinja(template, tokenizer), draft)
        _compare_prompts(draft, image_model, template, tell)
        if info is not None:
            replace(info, kind="model").write(draft)
    return info


def _stored_type(info: RunInfo | None, fp32: bool) -> torch.dtype:
    if fp32:
        return torch.float32
    return DTYPES.get(info.computed_in if info else "", torch.bfloat16)


def _self_contained(image_model: VisionLanguageModel) -> Any:
    """The model with a configuration that plain transformers reads, and a row for ``<image>``.

    Raises:
        ModelError: it has weights that LLaVA has no place for.
    """
    model = image_model.model
    embedding, head = model.get_input_embeddings(), model.lm_head
    if head.bias is not None and head.bias.any():
        raise ModelError(
            "the output head of this language model has a bias, which a "
            "LlavaForConditionalGeneration cannot hold: it would answer otherwise. Keep the parts: "
            "--save-format xtuner"
        )
    head.bias = None
    tied = head.weight is embedding.weight
    rows = image_model.image_token_id + 1
    text = portable_config(model.model.language_model)
    if embedding.weight.shape[0] < rows:
        grown = _with_mean_rows(embedding.weight, rows)
        embedding.weight = nn.Parameter(grown, requires_grad=False)
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


def _stop_as_in_chat(model: Any, tokenizer: Any, template: Template, tell: Tell) -> None:
    """Have ``generate`` end an answer where our chat does."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    ends = dict.fromkeys(i for i in (*template.stop_token_ids, *declared) if i is not None)
    model.generation_config.eos_token_id = list(ends)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    words = [w for w in template.stop_words[:1] if len(_ids(tokenizer, w)) != 1]
    if words:
        tell(
            f"Note: answers also end at the text {' or '.join(map(repr, words))}, which is no "
            f"token: in plain transformers, model.generate(..., stop_strings={words!r}, "
            "tokenizer=processor.tokenizer)."
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_mean_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    mean = weight.detach().float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight.detach(), mean.expand(rows - weight.shape[0], -1)])


def _save_processor(
    image_model: VisionLanguageModel, tokenizer: Any, chat_template: str, folder: Path
) -> None:
    """Write tokenizer, preparation of images and chat template as one LlavaProcessor."""
    from transformers import LlavaProcessor

    vision = image_model.model.config.vision_config
    upstream = getattr(image_model.processor, "upstream", None)
    if upstream is None:
        raise ModelError("this model has no preparation of images that can be saved")
    tokenizer.chat_template = chat_template
    _add_nothing(tokenizer)
    processor = LlavaProcessor(
        image_processor=upstream,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy_of(vision),
        chat_template=chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=int(strategy_of(vision) == "default"),
    )
    with quiet_transformers():
        processor.save_pretrained(str(folder))
        upstream.save_pretrained(str(folder))
    (folder / "chat_template.json").unlink(missing_ok=True)


def _add_nothing(tokenizer: Any) -> None:
    """Keep `tokenizer` from adding BOS and EOS to texts: the chat template writes what it wants,
    and ``processor(text=...)`` would add them once more, or where training had none."""
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    if tokenizer.is_fast and list(tokenizer("a")["input_ids"]) != _ids(tokenizer, "a"):
        tokenizer.backend_tokenizer.post_processor = None


def _compare_prompts(
    folder: Path, image_model: VisionLanguageModel, template: Template, tell: Tell
) -> None:
    """Read the processor again, and warn if it makes other tokens of a question than our chat."""
    from PIL import Image
    from transformers import AutoProcessor

    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(str(folder))
    asked = "What is it?"
    ids = template.prompt_ids([Message("user", f"{IMAGE}\n{asked}")])
    image = Image.new("RGB", (32, 32))
    token_id, tokens = image_model.image_token_id, image_model.processor.num_tokens(image.size)
    wanted, _ = expand(ids, token_id, [tokens] * ids.count(token_id))
    parts = [{"type": "image"}, {"type": "text", "text": asked}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    found = processor(text=text, images=image)["input_ids"][0]
    if list(found) != wanted:
        tell(
            f"Warning: the processor of plain transformers makes {len(found)} tokens of a question "
            f"that xtuner chat shows as {len(wanted)}, or other ones: its answers may differ."
        )


def merge_encoder(
    visual_encoder: str,
    adapter: Path,
    save_dir: Path,
    *,
    dtype: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> float:
    """Merge the adapter of a vision tower into it, and write the encoder as one model.

    Args:
        visual_encoder: CLIP or SigLIP, folder or hub name.
        adapter: a PEFT adapter, or a folder of parts, an ``iter_N`` or a work dir that has one.
        save_dir: a new folder.
        dtype: of the result; 'auto' is that of the encoder's files.
        device: where it is computed.

    Returns:
        The largest difference between what adapter and merged weights, in float32, make of noise,
        as a share of the largest number.

    Raises:
        ModelError: `adapter` is none, or does not fit.
        LaunchError: `save_dir` is taken, or the disk is too full.
    """
    folder = _encoder_adapter(adapter)
    encoder: Any = load_vision_tower(
        visual_encoder, dtype=torch.float32, device=pick_device(device)
    )
    with fitting_encoder_adapter(folder) as place:
        adapted: Any = load_adapter(encoder, place).eval()
    size = encoder.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, size, size, generator=generator).to(encoder.device)
    with torch.no_grad():
        before = adapted(pixel_values=pixels).last_hidden_state
        merged = adapted.merge_and_unload()
        after = merged(pixel_values=pixels).last_hidden_state
    difference = float((before - after).abs().max() / before.abs().max())
    merged = merged.to(DTYPES.get(dtype) or _dtype_of(located(visual_encoder)))
    size = sum(p.numel() * p.element_size() for p in merged.parameters())
    with new_folder(save_dir, num_bytes=size) as draft:
        with quiet_transformers():
            merged.save_pretrained(str(draft))
        LlavaImageProcessor.of_tower(visual_encoder).upstream.save_pretrained(str(draft))
    return difference


def _encoder_adapter(given: Path) -> Path:
    """The folder of the adapter that `given` means."""
    if (given / "adapter_config.json").is_file():
        return given
    with contextlib.suppress(CheckpointError):
        folder = find_checkpoint(given)
        if (folder / parts_of.ENCODER_ADAPTER).is_dir():
            return folder / parts_of.ENCODER_ADAPTER
    raise ModelError(
        f"{given}: is no adapter of a vision tower (no adapter_config.json), nor does it hold "
        f"one; give a folder {parts_of.ENCODER_ADAPTER}/, or the iter_N or work dir around it"
    )


def _dtype_of(place: str) -> torch.dtype:
    """The type of the weights of the model at `place`; what config.json says of a hub's."""
    if Path(place).is_dir():
        return main_dtype(cast_plan(Weights.of_model(Path(place)).stored, None))
    config = read_config(place)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
