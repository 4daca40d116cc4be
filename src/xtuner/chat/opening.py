"""Find out what a name or folder is, and open a conversation with it.

work dir ─► iter_N ─► adapter ─► run.yaml names base model, template, system message
                   └► model   ─► run.yaml, if xtuner wrote it, names template, system message
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from xtuner.chat.session import Session
from xtuner.device.select import pick_device, resolve_dtype
from xtuner.errors import ConfigError, ModelError
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import ImageInput
from xtuner.hub import fetch
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, load_tokenizer, read_config
from xtuner.models.quantize import Quantization, Rounding
from xtuner.models.run_info import RunInfo
from xtuner.models.vision.folder import LLM, is_llava_folder, run_of
from xtuner.models.vision.load import Sources, VisionLanguageModel, load_complete, load_llava
from xtuner.models.vision.tower import add_image_token
from xtuner.templates import load as load_template
from xtuner.templates.base import Template

logger = logging.getLogger("xtuner.chat")

_QUANTIZATION: dict[int, Quantization] = {4: "nf4", 8: "int8", 16: "none"}


@dataclass(frozen=True)
class Found:
    """What is to be loaded.

    Attributes:
        model: folder or hub name of the whole model.
        adapter: folder of the adapter on it, if any.
        tokenizer: folder or hub name of the tokenizer.
        template, system: what the run that wrote it trained with.
        quantization: how the run held the base model that an adapter was trained beside.
        llava: where the parts of a LLaVA model are; or "whole", where `model` is one.
    """

    model: str
    adapter: Path | None = None
    tokenizer: str = ""
    template: str = "auto"
    system: str = ""
    quantization: Quantization = "none"
    llava: Sources | Literal["whole"] | None = None


def open_chat(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    prompt_template: str | None = None,
    system: str | None = None,
    bits: int | None = None,
    options: GenerationOptions | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    visual_encoder: str | None = None,
    llava: str | Path | None = None,
) -> Session:
    """Load a model, adapter or checkpoint and open a conversation with it.

    Args:
        model: a checkpoint (``work_dirs/x/iter_N``), a work dir (its newest checkpoint), an
            adapter, a model folder, a name on the hub, or a name that `xtuner fetch` brought.
        adapter: folder of an adapter to put on `model`.
        prompt_template, system: in place of those that the checkpoint names.
        bits: 4 or 8 holds the model's linear layers quantised, 16 does not; None holds them as
            the run did that trained the adapter.
        options: of the answers.
        device: 'auto' is a GPU where there is one.
        dtype: of weights and computation; 'auto' is what a run here computes in.
        trust_remote_code: run Python code that comes with the model.
        visual_encoder: of a LLaVA model, in place of the one that its parts name.
        llava: folder of the parts of a LLaVA model that was trained on `model`.

    Raises:
        XTunerError: what is wrong with what was given.
    """
    if bits is not None and bits not in _QUANTIZATION:
        raise ConfigError(f"bits = {bits}: must be 4, 8 or 16 (unquantised), or left out")
    found = find(
        str(model),
        adapter=None if adapter is None else str(adapter),
        llava=None if llava is None else str(llava),
        visual_encoder=visual_encoder or "",
    )
    name = prompt_template or found.template
    tokenizer = load_tokenizer(found.tokenizer, trust_remote_code=trust_remote_code)
    if name == "auto" and not tokenizer.chat_template:
        raise ModelError(
            f"{model}: the tokenizer has no chat template, as base models have none. "
            "Name one with --prompt-template: 'default' is plain, and fits a model tuned with it"
        )
    if found.llava:
        add_image_token(tokenizer)  # before the template looks at the tokens
    template = load_template(name, tokenizer, system=found.system if system is None else system)
    place = pick_device(device)
    how: dict[str, Any] = {"dtype": resolve_dtype(dtype, place), "device": place}
    held = found.quantization if bits is None else _QUANTIZATION[bits]
    options = options or GenerationOptions()
    if found.llava == "whole":
        image_model = load_complete(Path(found.model), quantization=held, **how)
        return _seeing_session(image_model, tokenizer, template, options)
    how |= {"quantization": held, "trust_remote_code": trust_remote_code}
    if found.llava:
        image_model = load_llava(found.llava, tokenizer, **how)
        return _seeing_session(image_model, tokenizer, template, options)
    loaded = load_model(found.model, **how)
    network = load_adapter(loaded, found.adapter) if found.adapter else loaded
    network.eval()
    return Session(network, tokenizer, template=template, options=options)


def _seeing_session(
    image_model: VisionLanguageModel, tokenizer: Any, template: Template, options: GenerationOptions
) -> Session:
    vision = ImageInput(image_model, keep_features=True)
    return Session(image_model.model, tokenizer, template=template, options=options, vision=vision)


def find(
    model: str,
    *,
    adapter: str | None = None,
    llava: str | None = None,
    visual_encoder: str = "",
) -> Found:
    """What `model` means, with `adapter` on it and as a part of `llava`; see `open_chat`.

    Raises:
        ModelError: a folder is missing or holds neither a model nor an adapter.
        ConfigError: what is given does not go together.
    """
    found = _find_model(model)
    if llava is not None or visual_encoder:
        found = with_parts(found, llava, visual_encoder)
    if adapter is None:
        return found
    if found.llava == "whole":
        raise ConfigError(
            f"--adapter {adapter}: {model} is a whole LLaVA model, which takes none; put it on the "
            "parts: xtuner chat WORK_DIR --adapter DIR"
        )
    if found.adapter is not None:
        raise ModelError(
            f"{model}: is itself an adapter (on {found.model}), and --adapter gives another; "
            f"to use {adapter} with that base model: xtuner chat {found.model} --adapter {adapter}"
        )
    folder = _folder(adapter)
    if folder is None or not _is_adapter(folder):
        raise ModelError(f"--adapter {adapter}: {_what_is_there(folder or Path(adapter))}")
    theirs = _from_adapter(folder, base=found.model)
    ours = run_of(folder)
    if ours is not None and not _same(ours.base_model, found.model):
        logger.warning("the adapter was trained on %s, and is put on %s", ours.base_model, model)
    return _with_adapter(found, theirs) if found.llava else theirs


def _with_adapter(image_model: Found, adapter: Found) -> Found:
    """`image_model`, parts of a LLaVA model, with the adapter of `adapter` on its language model.

    Raises:
        ConfigError: the parts have one.
    """
    assert isinstance(image_model.llava, Sources)
    if image_model.llava.llm_adapter is not None:
        raise ConfigError(
            f"{adapter.adapter}: is a second adapter of the language model: "
            f"{image_model.llava.llm_adapter} is there already, and only one can be used"
        )
    held = adapter.quantization if image_model.quantization == "none" else image_model.quantization
    return replace(
        image_model,
        llava=replace(image_model.llava, llm_adapter=adapter.adapter),
        quantization=held,
    )


def _find_model(model: str) -> Found:
    folder = _folder(model)
    if folder is None:
        if _looks_like_path(model):
            raise ModelError(f"{model}: {_what_is_there(Path(model))}")
        if fetch.cached(model) is None and "/" not in model:
            raise ModelError(
                f"{model}: there is no such folder, and no model of that name was fetched. "
                f"`xtuner fetch {model}` fetches a model of the catalog; a checkpoint is given as "
                "its folder, such as work_dirs/my_run/iter_100"
            )
        return Found(model, tokenizer=model)
    if is_llava_folder(folder):
        return _from_parts(folder)
    if _is_adapter(folder):
        return _from_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model}: {_what_is_there(folder)}")
    whole: Literal["whole"] | None = (
        "whole" if read_config(str(folder)).get("model_type") == "llava" else None
    )
    found = Found(str(folder), tokenizer=str(folder), llava=whole)
    return _with_run(found, RunInfo.read(folder))


def with_parts(found: Found, llava: str | None, visual_encoder: str) -> Found:
    """`found` as the language model of the LLaVA model whose parts are in `llava`.

    Raises:
        ModelError: the parts are not there.
        ConfigError: `found` has parts of its own, or one part is given twice.
    """
    if llava is None:
        if not isinstance(found.llava, Sources):
            raise ModelError(
                "--visual-encoder needs --llava DIR, the folder of a projector trained with it"
            )
        folder = found.llava.parts
    else:
        place = _folder(llava)
        if place is None or not is_llava_folder(place):
            there = _what_is_there(place or Path(llava))
            raise ModelError(
                f"--llava {llava}: holds no parts of a LLaVA model (projector/): {there}"
            )
        folder = place
        if found.llava == "whole" or (found.llava and found.llava.parts != folder):
            raise ConfigError(
                f"--llava {llava}: MODEL is itself a LLaVA model; give the language model that "
                "the parts were trained with, or leave --llava out"
            )
    parts = _from_parts(folder, llm=found.model, visual_encoder=visual_encoder)
    _warn_of_others(folder, found.model, visual_encoder)
    return _with_adapter(parts, found) if found.adapter else parts


def _warn_of_others(folder: Path, llm: str, visual_encoder: str) -> None:
    """Warn of parts that were not trained together."""
    info = RunInfo.read(folder)
    if info is None:
        return
    llm = "" if (folder / LLM).is_dir() else llm  # Sources.of has told
    for what, trained, given in (
        ("language model", info.base_model, llm),
        ("vision tower", info.visual_encoder, visual_encoder),
    ):
        if trained and given and not _same(trained, given):
            logger.warning(
                "the projector was trained with the %s %s, and is used with %s",
                what, trained, given,
            )  # fmt: skip


def _from_parts(folder: Path, *, llm: str = "", visual_encoder: str = "") -> Found:
    sources = Sources.of(folder, llm=llm, visual_encoder=visual_encoder)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = str(folder) if own_tokenizer else sources.llm
    found = Found(sources.llm, tokenizer=tokenizer, llava=sources)
    return _with_run(found, RunInfo.read(folder))


def _from_adapter(folder: Path, *, base: str = "") -> Found:
    info = run_of(folder)
    if not base:
        base = info.base_model if info else _declared_base(folder)
        if not base:
            raise ModelError(
                f"{folder}: does not say which model it belongs to (neither run.yaml nor "
                f"adapter_config.json does); give it: xtuner chat MODEL --adapter {folder}"
            )
        if _folder(base) is None and _looks_like_path(base):
            raise ModelError(
                f"{folder}: is an adapter on {base}, which is not there any more. Give the base "
                f"model's new place: xtuner chat MODEL --adapter {folder}"
            )
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    found = Found(base, adapter=folder, tokenizer=str(folder) if own_tokenizer else base)
    return _with_run(found, info)


def _with_run(found: Found, info: RunInfo | None) -> Found:
    if info is None:
        return found
    rounding = Rounding.of_run(info.settings) if info.kind in ("adapter", "llava") else None
    return replace(
        found,
        template=info.prompt_template,
        system=info.system,
        quantization=rounding.quant_type if rounding else "none",
    )


def _folder(name: str) -> Path | None:
    """The folder that `name` means: a work dir means its newest checkpoint, x.pth means x."""
    path = Path(name).expanduser()
    path = path.with_suffix("") if path.suffix == ".pth" else path
    pointer = path / "last_checkpoint"
    if pointer.is_file():
        path = path / Path(pointer.read_text(encoding="utf-8").strip()).name
    return path if path.is_dir() else None


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _declared_base(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config.get("base_model_name_or_path") or "")


def _looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a name on the hub, which has one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".pth", "/"))


def _same(one: str, other: str) -> bool:
    def place(name: str) -> str:
        folder = _folder(name) or fetch.cached(name)
        return str(folder.resolve()) if folder else name

    return place(one) == place(other)


def _what_is_there(path: Path) -> str:
    """Say what was looked for at `path` and what is there instead."""
    looked = (
        "looked for config.json (a model), adapter_config.json (an adapter) and last_checkpoint "
        "(a work dir)"
    )
    place = path
    while not place.is_dir() and place != place.parent:
        place = place.parent
    names = sorted(p.name for p in place.glob("*") if not p.name.startswith("."))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if place == path:
        return f"{looked}; the folder holds {shown or 'nothing'}"
    return f"there is no such folder; {place.resolve()} holds {shown or 'nothing'}"
