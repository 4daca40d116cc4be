"""Open a conversation with a model, adapter or checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from xtuner import plugins, templates
from xtuner.chat.lookup import ChatSource, find, folder_of
from xtuner.chat.session import Session
from xtuner.device.select import pick_device, resolve_dtype
from xtuner.errors import ConfigError, ModelError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import ImageInput
from xtuner.models import manifest
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, load_tokenizer
from xtuner.models.quantize import Quantization
from xtuner.models.vision.load import load_complete, load_llava
from xtuner.models.vision.tower import add_image_token
from xtuner.templates.base import Template
from xtuner.types import Message

logger = logging.getLogger("xtuner.chat")

_QUANTIZATION: dict[int, Quantization] = {4: "nf4", 8: "int8", 16: "none"}


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
    trust_code: bool = False,
    visual_encoder: str | None = None,
    llava: str | Path | None = None,
) -> Session:
    """Load a model, adapter or checkpoint and open a conversation with it.

    Args:
        model: A checkpoint (``work_dirs/x/iter_N``), a work dir (its newest checkpoint), an
            adapter, a model folder, a name on the hub, or a name given to `xtuner fetch`.
        adapter: Folder of an adapter to load on `model`.
        prompt_template, system: Override those recorded in the checkpoint.
        bits: 4 or 8 quantizes the linear layers of the model, 16 does not; None uses the
            quantization of the run that trained the adapter.
        options: Generation options.
        device: 'auto' uses a GPU if there is one.
        dtype: The dtype of weights and computation; 'auto' is that of training on this device.
        trust_remote_code: Run Python code that ships with the model.
        trust_code: Run the Python file that the checkpoint's run.yaml names as its template.
        visual_encoder: Vision tower of a LLaVA model; overrides the one that its parts name.
        llava: Folder of the parts of a LLaVA model that was trained with `model`.

    Raises:
        XTunerError: The model cannot be opened.
    """
    if bits is not None and bits not in _QUANTIZATION:
        raise ConfigError(f"bits = {bits}: must be 4, 8 or 16 (unquantized)")
    found = _find_checked(model, adapter, llava, visual_encoder)
    tokenizer, template = text_parts(
        found,
        where=str(model),
        prompt_template=prompt_template,
        system=system,
        trust_remote_code=trust_remote_code,
        trust_code=trust_code,
    )
    torch_device = pick_device(device)
    loaded, vision = _load(
        found,
        tokenizer,
        trust_remote_code=trust_remote_code,
        dtype=resolve_dtype(dtype, torch_device),
        device=torch_device,
        quantization=found.quantization if bits is None else _QUANTIZATION[bits],
    )
    return Session(
        loaded, tokenizer, template=template, options=options or GenerationOptions(), vision=vision
    )


def _find_checked(
    model: str | Path,
    adapter: str | Path | None,
    llava: str | Path | None,
    visual_encoder: str | None,
) -> ChatSource:
    """`find`, after a check that the folders are complete."""
    for folder in (folder_of(str(name)) for name in (model, adapter, llava) if name is not None):
        if folder is not None:
            manifest.check(folder)
    found = find(
        str(model),
        adapter=None if adapter is None else str(adapter),
        llava=None if llava is None else str(llava),
        visual_encoder=visual_encoder or "",
    )
    if found.model != str(model) and Path(found.model).is_dir():
        manifest.check(Path(found.model))
    return found


def _load(
    found: ChatSource, tokenizer: Any, *, trust_remote_code: bool, **how: Any
) -> tuple[Any, ImageInput | None]:
    """The model of `found`, and its image input if it takes images."""
    if found.llava == "huggingface":
        complete = load_complete(Path(found.model), **how)
        return complete.model, ImageInput(complete, keep_features=True)
    how["trust_remote_code"] = trust_remote_code
    if found.llava:
        joined = load_llava(found.llava, tokenizer, **how)
        return joined.model, ImageInput(joined, keep_features=True)
    base = load_model(found.model, **how)
    loaded = load_adapter(base, found.adapter) if found.adapter else base
    return loaded.eval(), None


def text_parts(
    found: ChatSource,
    *,
    where: str,
    prompt_template: str | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    trust_code: bool = False,
) -> tuple[Any, Template]:
    """The tokenizer and template of `found`; arguments as for `open_chat`.

    Args:
        where: The name of the model in error messages.

    Raises:
        XTunerError: The tokenizer or template cannot be used.
    """
    name = prompt_template or found.template
    tokenizer = load_tokenizer(found.tokenizer, trust_remote_code=trust_remote_code)
    if name == "auto" and not tokenizer.chat_template:
        raise ModelError(
            f"{where}: the tokenizer has no chat template, which is common for base models. Select "
            "the template that the model was tuned with, such as --prompt-template default"
        )
    if found.llava:
        add_image_token(tokenizer)  # before the template reads the tokens
    system = found.system if system is None else system
    if prompt_template:
        template = templates.load(prompt_template, tokenizer, system=system)
        if found.trained and not _renders_alike(template, found, tokenizer, system):
            logger.warning(
                "%s was trained with the template %s, but is used with %s; answers may be worse",
                where, found.template, prompt_template,
            )  # fmt: skip
        return tokenizer, template
    template = templates.of_checkpoint(
        found.template, tokenizer, fields=found.own_template, system=system,
        where=str(found.adapter or where), trust_code=trust_code,
    )  # fmt: skip
    return tokenizer, template


def _renders_alike(given: Template, found: ChatSource, tokenizer: Any, system: str) -> bool:
    """Whether `given` renders a prompt like the template of the training run."""
    if plugins.is_user_path(found.template) and not found.own_template:
        return False
    try:
        trained = templates.of_checkpoint(
            found.template, tokenizer, fields=found.own_template, system=system, where="the model"
        )
    except XTunerError:
        return False
    probe = [Message("user", "a")]
    return list(trained.prompt_ids(probe)) == list(given.prompt_ids(probe))
