"""Generate an answer token by token.

    messages ──template──► prompt ids ──model──► id, id, ... ──► text, until a stop token or word

The loop is our own and runs in the caller's thread, so that Ctrl-C, errors and autocast act as in
any other code. Sampling draws from a generator of its own: nothing outside changes a seeded answer,
and the answer changes no random state outside. The model's `generation_config` adds its end tokens
and nothing else; greedy answers are those of `model.generate(do_sample=False)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import ConfigError, ModelError, listed
from xtuner.generation.detokenize import Detokenizer, StopWords
from xtuner.generation.images import ImageInput
from xtuner.kernels.attention import packed
from xtuner.models.vision.llava import decoder_of
from xtuner.templates.base import Template
from xtuner.types import Message


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: None or 0 takes the likeliest token each time; above 0 draws tokens, the
            likelier the lower the temperature.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together have this probability.
        repetition_penalty: above 1 makes tokens less likely that occurred before.
        seed: same seed, same drawn answer.
        stop_words: end the answer at one of these texts, besides those of the template.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks: dict[str, tuple[Callable[[float], bool], str]] = {
            "max_new_tokens": (lambda v: v >= 1, "1 or more"),
            "temperature": (lambda v: v >= 0, "0 (always the likeliest token) or more"),
            "top_k": (lambda v: v >= 1, "1 or more"),
            "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
            "repetition_penalty": (lambda v: v > 0, "above 0"),
        }
        wrong = [
            f"{name} = {value}: must be {allowed}"
            for name, (holds, allowed) in checks.items()
            if (value := getattr(self, name)) is not None and not holds(value)
        ]
        if wrong:
            raise ConfigError(listed("options of the answer:", wrong))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, rather than the likeliest taken."""
        return bool(self.temperature)

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Options that were given and change nothing."""
        drawing = ("top_k", "top_p", "seed")
        return () if self.samples else tuple(n for n in drawing if getattr(self, n) is not None)


def stream(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    messages: Sequence[Message],
    options: GenerationOptions,
    vision: ImageInput | None = None,
) -> Generator[str, None, None]:
    """Yield the assistant's answer to `messages`, piece by piece.

    `model` may be in training: it is set to evaluation while the answer grows and then back.
    `vision` shows it the images of the messages.

    Raises:
        ModelError: the messages fill the model's context.
        DataError: the template has no place for these messages.
    """
    prompt = template.prompt_ids(messages)
    prompt = vision.widened(prompt) if vision else prompt
    room = room_for_answer(model, prompt)
    ends = end_tokens(model, tokenizer, template, options)
    words = StopWords([*template.stop_words, *options.stop_words])
    text = Detokenizer(tokenizer)
    with generation_mode(model):
        with packed.without_cudnn(next(model.parameters()).device):
            first = vision.inputs(prompt, messages) if vision else {}
        ids = _token_ids(model, prompt, options, first)
        for _, token_id in zip(range(min(room, options.max_new_tokens)), ids, strict=False):
            if token_id in ends:
                break
            if piece := words.add(text.add(token_id)):
                yield piece
            if words.found:
                return
    if rest := words.add(text.rest()) + words.rest():
        yield rest


def room_for_answer(model: Any, prompt: Sequence[int]) -> int:
    """Tokens that `model` has left for an answer to `prompt`.

    Raises:
        ModelError: there are none.
    """
    limit = context_length(model)
    if len(prompt) >= limit:
        raise ModelError(
            f"the conversation has {len(prompt)} tokens, and the model takes {limit}: "
            "shorten the question"
        )
    return limit - len(prompt)


def context_length(model: Any) -> int:
    """Most tokens that `model` was made for; very many where it does not say."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**40)


@contextmanager
def generation_mode(model: Any) -> Iterator[None]:
    """Set `model` to generate inside the block, and back to what it was behind it.

    Dropout and gradient checkpointing rest, as both belong to training mode; and xtuner's attention
    for packed rows, which knows no cache, gives way to one that does.
    """
    base = decoder_of(model)
    training = [module for module in model.modules() if module.training]
    before = base.config._attn_implementation
    model.eval()
    try:
        if before == packed.NAME:
            base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        yield
    finally:
        if before == packed.NAME:
            base.set_attn_implementation(before)
        for module in training:
            module.training = True


def _token_ids(
    model: Any, prompt: list[int], options: GenerationOptions, first: Mapping[str, Any]
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, without end; `first` stands for a prompt with
    images."""
    embedding = model.get_input_embeddings().weight
    device = next(model.parameters()).device  # an embedding may lie elsewhere
    choose = chooser(options, device)
    # The token of an image may lie beyond the vocabulary, and is no word that was said.
    said = [i for i in prompt if i < embedding.shape[0]] if first else prompt
    seen = torch.tensor([said], device=device)
    step, cache = seen, None
    inputs: dict[str, Any] = dict(first) or {"input_ids": step}
    extra: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    cached = takes(model, "past_key_values")  # models with a state of another kind go without
    while True:
        # Neither grad mode nor the choice of kernels may stay while the caller has the piece.
        with torch.no_grad(), packed.without_cudnn(device):
            if cached:
                extra["past_key_values"] = cache
            output = model(**inputs, use_cache=cached, **extra)
            chosen = choose(seen, output.logits[:, -1].float())
        yield int(chosen)
        seen = torch.cat([seen, chosen[:, None]], dim=1)
        cache = output.past_key_values if cached else None
        step = seen if cache is None else chosen[:, None]
        inputs = {"input_ids": step}


def takes(model: Any, argument: str) -> bool:
    """Whether the forward pass of `model` has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def chooser(options: GenerationOptions, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (ids so far ``[1, T]``, scores ``[1, V]``) that returns the next id ``[1]``."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if options.repetition_penalty is not None:
        steps.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if not options.samples:
        return lambda seen, scores: steps(seen, scores).argmax(dim=-1)
    steps.append(TemperatureLogitsWarper(float(options.temperature or 1.0)))
    if options.top_k is not None:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        steps.append(TopPLogitsWarper(float(options.top_p)))
    generator = torch.Generator(device)
    generator.manual_seed(options.seed) if options.seed is not None else generator.seed()

    def draw(seen: Tensor, scores: Tensor) -> Tensor:
        probabilities = steps(seen, scores).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return draw


def end_tokens(
    model: Any, tokenizer: Any, template: Template, options: GenerationOptions
) -> frozenset[int]:
    """Ids at which an answer ends, of the template, the tokenizer and the model."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    vocabulary = tokenizer.get_added_vocab()
    # Special tokens have no text in the answer, so as stop words they are known by their ids.
    special = [vocabulary.get(word) for word in options.stop_words]
    ids = [*template.stop_token_ids, tokenizer.eos_token_id, *declared, *special]
    return frozenset(token_id for token_id in ids if token_id is not None)
