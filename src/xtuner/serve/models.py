"""The models that are served: one set of weights, and adapters on it under names of their own.

xtuner serve work_dirs/assistant   ──►   SmolLM2-135M-Instruct               the base model
                                         SmolLM2-135M-Instruct:assistant     with the adapter
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner import templates
from xtuner.chat.lookup import find
from xtuner.chat.opening import open_chat, text_parts
from xtuner.chat.session import Session
from xtuner.errors import ConfigError
from xtuner.generation.running import takes_batches
from xtuner.models import manifest
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_tokenizer, located, read_config
from xtuner.models.vision.load import VisionLanguageModel
from xtuner.models.vocabulary import misfit
from xtuner.templates.base import Template


class Weights:
    """A model in memory, with its adapters."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.takes_batches = takes_batches(model)

    def with_adapter(self, adapter: str | None) -> AbstractContextManager[Any]:
        """Inside, the model computes with `adapter`, or without any."""
        if not hasattr(self.model, "peft_config"):
            return contextlib.nullcontext()
        if adapter is None:
            without: AbstractContextManager[Any] = self.model.disable_adapter()
            return without
        if self.model.active_adapter != adapter:
            self.model.set_adapter(adapter)
        return contextlib.nullcontext()


@dataclass(frozen=True)
class ServedModel:
    """A model under a name.

    Attributes:
        name: What requests call it.
        weights: Shared by all models with the same base.
        tokenizer, template: The tokenizer and template of the run that trained it.
        adapter: Its adapter on `weights`; None for the base model.
        vision: The model's image input; None for a text model.
        created: Seconds since the epoch.
    """

    name: str
    weights: Weights
    tokenizer: Any
    template: Template
    adapter: str | None = None
    vision: VisionLanguageModel | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def tokenizing(self) -> Iterator[Template]:
        """The template, for one thread at a time: tokenizers are not thread-safe."""
        with self._tokenizing:
            yield self.template

    @property
    def verbatim(self) -> Template:
        """The template that leaves text as it is, with the BOS token as in pretraining."""
        return templates.load("verbatim", self.tokenizer)


def open_models(
    model: str, adapters: Sequence[str] = (), *, base_too: bool = True, **options: Any
) -> list[ServedModel]:
    """Load `model` and `adapters` on it.

    Args:
        model: What `open_chat` takes; of a run with an adapter the base model is served as well.
        adapters: Folders of further adapters, each as ``DIR`` or ``NAME=DIR``.
        base_too: Also serve the base model without an adapter, if the adapter has its vocabulary.
        options: Further arguments of `open_chat`.

    Raises:
        XTunerError: A model or adapter cannot be opened.
    """
    found = find(model)
    named = [_named(adapter) for adapter in adapters]
    if found.llava is not None:
        if named:
            raise ConfigError(f"--adapter: {model} takes images; it is served without others")
        session = open_chat(model, **options)
        return [_served(short_name(model), Weights(session.model), session)]
    if found.adapter is not None:
        named.insert(0, (short_name(model), str(found.adapter)))
    base = short_name(found.model)
    if not named:
        session = open_chat(model, **options)
        return [_served(base, Weights(session.model), session)]
    (first, folder), *others = named
    if _has_own_vocabulary(found.model, folder):
        if others:
            raise ConfigError(
                f"{folder}: the adapter has a vocabulary of its own; serve it without others"
            )
        base_too = False
    session = open_chat(found.model, adapter=folder, **options)
    weights = Weights(session.model)
    served = [_served(f"{base}:{first}", weights, session, adapter="default")]
    for name, folder in others:
        added = add_model(weights, f"{base}:{name}", adapter=folder, base=found.model, **options)
        served.append(added)
    if base_too:
        served.insert(0, _base(base, weights, session, found.model, options))
    return _distinct(served)


def _has_own_vocabulary(model: str, adapter: str) -> bool:
    """Whether `adapter` was trained with another number of tokens than `model` has."""
    size = read_config(located(model)).get("vocab_size")
    folder = find(model, adapter=adapter).adapter
    return isinstance(size, int) and folder is not None and bool(misfit(folder, size))


def short_name(model: str) -> str:
    """The name of a model: of a folder its last part, of a checkpoint run and checkpoint."""
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("iter_") else path.name


def _named(adapter: str) -> tuple[str, str]:
    name, separator, folder = adapter.partition("=")
    return (name, folder) if separator and name else (short_name(adapter), adapter)


def _served(
    name: str, weights: Weights, session: Session, adapter: str | None = None
) -> ServedModel:
    vision = session.vision.model if session.vision else None
    return ServedModel(name, weights, session.tokenizer, session.template, adapter, vision)


def add_model(
    weights: Weights, name: str, *, adapter: str, base: str, **options: Any
) -> ServedModel:
    """Load another adapter on `weights`, and serve it as `name`.

    Args:
        weights: Of the model `base`, with or without adapters; no answer may be in progress.
        name: What requests call it.
        adapter: Folder of the adapter.
        base: What `open_chat` calls the base model.
        options: Further arguments of `open_chat`; those about text count.

    Raises:
        XTunerError: The adapter cannot be opened, or does not fit the base model.
    """
    found = find(base, adapter=adapter)
    assert found.adapter is not None
    manifest.check(found.adapter)
    tokenizer, template = text_parts(found, where=adapter, **_of_text(options))
    key = f"adapter{len(getattr(weights.model, 'peft_config', ()))}"
    weights.model = load_adapter(weights.model, found.adapter, name=key)
    weights.model.eval()
    return ServedModel(name, weights, tokenizer, template, key)


def _base(
    name: str, weights: Weights, session: Session, base: str, options: dict[str, Any]
) -> ServedModel:
    """The base model, with its own template, or that of its adapter if it has none."""
    trust = bool(options.get("trust_remote_code"))
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    if not tokenizer.chat_template or options.get("prompt_template"):
        return ServedModel(name, weights, session.tokenizer, session.template)
    template = templates.load("auto", tokenizer, system=options.get("system") or "")
    return ServedModel(name, weights, tokenizer, template)


def _of_text(options: dict[str, Any]) -> dict[str, Any]:
    names = ("prompt_template", "system", "trust_remote_code", "trust_code")
    return {name: value for name, value in options.items() if name in names}


def _distinct(served: Sequence[ServedModel]) -> list[ServedModel]:
    """Refuse two models of one name."""
    names = [model.name for model in served]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"--adapter: two models are called {', '.join(twice)}; name them: --adapter NAME=DIR"
        )
    return list(served)
