"""Checks before a run reads data: model, tokenizer, optimizer, attention and hooks."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AttentionInterface

from xtuner.config.marks import thawed
from xtuner.config.schema import Settings
from xtuner.data.packing.pack import PackedDataset
from xtuner.engine.hooks.base import custom_classes
from xtuner.engine.optimizer import optim
from xtuner.errors import (
    ConfigError,
    DataError,
    ModelError,
    XTunerError,
    count,
    did_you_mean,
    listed,
)
from xtuner.models.adapter_checks import config_problems, layer_problems
from xtuner.models.facts import ModelFacts, facts_of
from xtuner.models.prepare import try_adapters
from xtuner.templates.base import Template
from xtuner.training.first_check import attention_problem
from xtuner.training.publish import check_target
from xtuner.types import Conversation, Message

_MOST_NAMES = 4


def check_run(settings: Settings, *, folder: Path | None = None) -> None:
    """Check what a run needs besides data; all problems are reported together.

    Args:
        folder: The folder of the settings file, where custom hooks are looked up first.

    Raises:
        ConfigError: Settings do not fit the model, or name a package that is not installed.
        ModelError: The model cannot be trained.
    """
    facts = facts_of(settings)
    problems = [*_stored_weights(settings, facts), *_positions(settings, facts)]
    hooks = functools.partial(_hooks, folder=folder or Path.cwd())
    for check in (_attention, _optimizer, _adapters, _trackers, _push, hooks):
        problems += check(settings)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(listed(f"{len(problems)} problems with the settings:", problems))


def _stored_weights(s: Settings, facts: ModelFacts) -> Iterator[str]:
    stored = facts.stored_quantization
    if stored and s.llm_training == "full":
        yield (
            f"tuning = 'full': the weights of {facts.path} are stored in {stored}, which cannot be "
            "trained. Set tuning = 'lora', or give the model with its original weights"
        )


def _positions(s: Settings, facts: ModelFacts) -> Iterator[str]:
    limit = facts.positions
    if limit and s.max_length > limit and facts.learned_positions:
        yield (
            f"max_length = {s.max_length:,}: {facts.path} has {limit:,} learned positions and "
            f"does not support longer texts; set max_length = {limit} or less"
        )


def note_on_positions(s: Settings, train: PackedDataset) -> str | None:
    """A note on samples that are longer than the model's context; None if there are none."""
    limit = facts_of(s).positions
    num_longer, longest = train.num_longer(limit) if limit and not s.has_vision else (0, 0)
    if not num_longer:
        return None
    samples = count(num_longer, "sample is", "samples are")
    return (
        f"{samples} longer than the model's {limit:,} positions (the longest has {longest:,} "
        f"tokens); it may perform poorly beyond these. max_length = {limit} cuts longer samples"
    )


def _attention(s: Settings) -> Iterator[str]:
    name = s.attn_implementation
    yield from attention_problem(name)
    known = ["auto", "eager", *AttentionInterface().valid_keys()]
    if name not in known and "/" not in name:
        yield (
            f"attn_implementation = {name!r}: unknown attention; use 'auto', 'sdpa', "
            f"'eager' or 'flash_attention_2'{did_you_mean(name, known)}"
        )


def _optimizer(s: Settings) -> Iterator[str]:
    yield from _raised(lambda: optim.check_name(s.optim_type))


def _adapters(s: Settings) -> Iterator[str]:
    if not s.uses_adapter:
        return
    model, further = facts_of(s).model, thawed(s.lora_config) or {}
    problems = [
        *layer_problems(model, s.lora_target_modules, s.lora_modules_to_save),
        *(config_problems(further) if further else ()),
    ]
    usual = s.lora_target_modules == ("all-linear",) and not s.lora_modules_to_save
    if problems or (usual and not further and not s.resize_embeddings):
        yield from problems
    else:  # which takes up to some seconds
        yield from _raised(lambda: try_adapters(model, s))


def _hooks(s: Settings, *, folder: Path) -> Iterator[str]:
    for name in s.custom_hooks:
        yield from _raised(functools.partial(custom_classes, [name], folder=folder))


def _trackers(s: Settings) -> Iterator[str]:
    for name in s.report_to:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            yield (
                f"report_to = {name!r}: the package {name} is not installed: "
                f"pip install 'xtuner[{name}]'"
            )


def _push(s: Settings) -> Iterator[str]:
    target = s.push_to_hub
    if target is not None:
        yield from _raised(lambda: check_target(target))


def _raised(check: Callable[[], object]) -> Iterator[str]:
    """Run `check`, and yield the message of an error that the user can fix."""
    try:
        check()
    except XTunerError as error:
        yield str(error)


def tokens_without_embedding(tokenizer: Any, facts: ModelFacts) -> dict[str, int]:
    """The tokens of `tokenizer` whose ids exceed the model's embedding."""
    if len(tokenizer) <= facts.vocab_size:
        return {}
    return {t: i for t, i in tokenizer.get_vocab().items() if i >= facts.vocab_size}


def check_tokenizer(tokenizer: Any, template: Template, facts: ModelFacts) -> int | None:
    """Check that the model has an embedding for every token that a conversation needs.

    Returns:
        The number of embeddings if the tokenizer has tokens beyond them: rows with such tokens
            cannot be used. None if all tokens have an embedding.

    Raises:
        ModelError: The template writes a token without an embedding.
    """
    extra = tokens_without_embedding(tokenizer, facts)
    if not extra:
        return None
    turns = (Message("user", "Hello"), Message("assistant", "Hello"))
    try:
        written = template.encode(Conversation(turns)).input_ids
    except DataError:
        written = []
    if max(written, default=0) >= facts.vocab_size:
        names = sorted(extra, key=extra.__getitem__)
        shown = ", ".join(map(repr, names[:_MOST_NAMES])) + ", ..." * (len(names) > _MOST_NAMES)
        raise ModelError(
            f"{facts.path}: the tokenizer has {len(tokenizer):,} tokens, but the model only "
            f"{facts.vocab_size:,} embeddings, and the template writes tokens without one "
            f"({shown}). Use the tokenizer that belongs to the model, set another prompt_template, "
            f"or set resize_embeddings = True, which adds and trains them"
        )
    return facts.vocab_size
