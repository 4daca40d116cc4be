"""Resolve a name or folder to a model, adapter, tokenizer and template.

work dir ─► iter_N ─► adapter ─► run.yaml: base model, template, system message
                   └► model   ─► run.yaml, if xtuner wrote it: template, system message
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xtuner.errors import ConfigError, ModelError, shell_command
from xtuner.models.adapter_config import read_adapter_config
from xtuner.models.load import read_config
from xtuner.models.quantize import Quantization, Rounding
from xtuner.models.references import (
    checkpoint_of,
    contents,
    looks_like_path,
    refuse_missing,
    same_model,
)
from xtuner.models.run_info import RunInfo
from xtuner.models.vision.folder import LLM, is_llava_folder, run_of
from xtuner.models.vision.load import Sources

logger = logging.getLogger("xtuner.chat")


@dataclass(frozen=True)
class ChatSource:
    """What to load for a chat.

    Attributes:
        model: Folder or hub name of the model.
        adapter: Folder of the adapter on it, if any.
        tokenizer: Folder or hub name of the tokenizer.
        template, system: Prompt template and system message of the training run.
        own_template: Fields of the template, if it was the user's own.
        quantization: Quantization of the base model during the training of the adapter.
        trained: The template is that of a training run, which recorded it.
        llava: Where the parts of a LLaVA model are, or "huggingface" if `model` is a
            LlavaForConditionalGeneration.
    """

    model: str
    adapter: Path | None = None
    tokenizer: str = ""
    template: str = "auto"
    system: str = ""
    own_template: Mapping[str, Any] = field(default_factory=dict)
    quantization: Quantization = "none"
    trained: bool = False
    llava: Sources | Literal["huggingface"] | None = None


def find(
    model: str,
    *,
    adapter: str | None = None,
    llava: str | None = None,
    visual_encoder: str = "",
) -> ChatSource:
    """Resolve `model`, with `adapter` on it and as a part of `llava`; see `open_chat`.

    Raises:
        ModelError: A folder is missing or contains neither a model nor an adapter.
        ConfigError: The arguments cannot be combined.
    """
    found = _find_model(model)
    if llava is not None or visual_encoder:
        found = with_parts(found, llava, visual_encoder)
    if adapter is None:
        return found
    if found.llava == "huggingface":
        raise ConfigError(
            f"--adapter {adapter}: {model} is a merged LLaVA model, which cannot load adapters; "
            "load it on the parts: xtuner chat WORK_DIR --adapter DIR"
        )
    if found.adapter is not None:
        raise ModelError(
            f"{model}: is itself an adapter (on {found.model}), so --adapter cannot add another; "
            f"to use {adapter} with that base model: "
            + shell_command("xtuner", "chat", found.model, "--adapter", adapter)
        )
    folder = folder_of(adapter)
    if folder is None or not _is_adapter(folder):
        raise ModelError(f"--adapter {adapter}: {contents(folder or Path(adapter))}")
    with_adapter = _from_adapter(folder, base=found.model)
    info = run_of(folder)
    if info is not None and not same_model(info.base_model, found.model):
        logger.warning("the adapter was trained on %s, but is loaded on %s", info.base_model, model)
    return _with_adapter(found, with_adapter) if found.llava else with_adapter


def _with_adapter(image_model: ChatSource, adapter: ChatSource) -> ChatSource:
    """Return `image_model`, parts of a LLaVA model, with `adapter` on its language model.

    Raises:
        ConfigError: The parts already have an adapter.
    """
    assert isinstance(image_model.llava, Sources)
    if image_model.llava.llm_adapter is not None:
        raise ConfigError(
            f"{adapter.adapter}: the language model already has the adapter "
            f"{image_model.llava.llm_adapter}; only one can be used"
        )
    with_quantization = adapter if image_model.quantization == "none" else image_model
    return replace(
        image_model,
        llava=replace(image_model.llava, llm_adapter=adapter.adapter),
        quantization=with_quantization.quantization,
    )


def _find_model(model: str) -> ChatSource:
    folder = folder_of(model)
    if folder is None:
        refuse_missing(model)
        return ChatSource(model, tokenizer=model)
    if is_llava_folder(folder):
        return _from_parts(folder)
    if _is_adapter(folder):
        return _from_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model}: {contents(folder)}")
    llava: Literal["huggingface"] | None = (
        "huggingface" if read_config(str(folder)).get("model_type") == "llava" else None
    )
    found = ChatSource(str(folder), tokenizer=str(folder), llava=llava)
    return _with_run(found, RunInfo.read(folder))


def with_parts(found: ChatSource, llava: str | None, visual_encoder: str) -> ChatSource:
    """Return `found` as the language model of the LLaVA model whose parts are in `llava`.

    Raises:
        ModelError: The parts are missing.
        ConfigError: `found` has parts of its own, or a part is given twice.
    """
    if llava is None:
        if not isinstance(found.llava, Sources):
            raise ModelError(
                "--visual-encoder requires --llava DIR, the folder of a projector trained with it"
            )
        folder = found.llava.parts
    else:
        given = folder_of(llava)
        if given is None or not is_llava_folder(given):
            seen = contents(given or Path(llava))
            raise ModelError(
                f"--llava {llava}: contains no parts of a LLaVA model (projector/): {seen}"
            )
        folder = given
        if found.llava == "huggingface" or (found.llava and found.llava.parts != folder):
            raise ConfigError(
                f"--llava {llava}: MODEL is itself a LLaVA model; give the language model that "
                "the parts were trained with, or omit --llava"
            )
    parts = _from_parts(folder, llm=found.model, visual_encoder=visual_encoder)
    _warn_of_mismatch(folder, found.model, visual_encoder)
    return _with_adapter(parts, found) if found.adapter else parts


def _warn_of_mismatch(folder: Path, llm: str, visual_encoder: str) -> None:
    """Warn about parts that were not trained together."""
    info = RunInfo.read(folder)
    if info is None:
        return
    llm = "" if (folder / LLM).is_dir() else llm  # Sources.of warns about this one
    for what, trained, given in (
        ("language model", info.base_model, llm),
        ("vision tower", info.visual_encoder, visual_encoder),
    ):
        if trained and given and not same_model(trained, given):
            logger.warning(
                "the projector was trained with the %s %s, but is used with %s",
                what, trained, given,
            )  # fmt: skip


def _from_parts(folder: Path, *, llm: str = "", visual_encoder: str = "") -> ChatSource:
    sources = Sources.of(folder, llm=llm, visual_encoder=visual_encoder)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = str(folder) if own_tokenizer else sources.llm
    found = ChatSource(sources.llm, tokenizer=tokenizer, llava=sources)
    return _with_run(found, RunInfo.read(folder))


def _from_adapter(folder: Path, *, base: str = "") -> ChatSource:
    info = run_of(folder)
    if not base:
        base = info.base_model if info else _declared_base(folder)
        if not base:
            raise ModelError(
                f"{folder}: neither run.yaml nor adapter_config.json names the base model; "
                f"give it: {shell_command('xtuner', 'chat', 'MODEL', '--adapter', folder)}"
            )
        if folder_of(base) is None and looks_like_path(base):
            raise ModelError(
                f"{folder}: is an adapter on {base}, which no longer exists. Give the new path of "
                f"the base model: {shell_command('xtuner', 'chat', 'MODEL', '--adapter', folder)}"
            )
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    found = ChatSource(base, adapter=folder, tokenizer=str(folder) if own_tokenizer else base)
    return _with_run(found, info)


def _with_run(found: ChatSource, info: RunInfo | None) -> ChatSource:
    if info is None:
        return found
    rounding = Rounding.of_run(info.settings) if info.kind in ("adapter", "llava") else None
    return replace(
        found,
        template=info.prompt_template,
        system=info.system,
        own_template=info.template,
        trained=True,
        quantization=rounding.quant_type if rounding else "none",
    )


def folder_of(name: str) -> Path | None:
    """The folder that `name` refers to, if it exists; see `checkpoint_of`."""
    folder = checkpoint_of(name)
    return folder if folder.is_dir() else None


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _declared_base(folder: Path) -> str:
    return str(read_adapter_config(folder).get("base_model_name_or_path") or "")
