"""Generate an answer token by token.

    messages ──template──► prompt ids ──model──► id, id, ... ──► text, until a stop token or word

The loop runs in the caller's thread, so that Ctrl-C, errors and autocast behave as in any other
code. Sampling uses its own random generator: seeded answers are reproducible, and the global random
state does not change. From the model's `generation_config` only the end tokens are used; greedy
answers equal those of `model.generate(do_sample=False)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.device.heap import trim_if_grown
from xtuner.errors import ConfigError, ModelError, listed
from xtuner.generation.detokenize import Detokenizer, StopWords
from xtuner.generation.images import ImageInput
from xtuner.kernels.attention import packed
from xtuner.models.vision.llava import decoder_of
from xtuner.templates.base import Template
from xtuner.types import Message


@dataclass(frozen=True)
class GenerationOptions:
    """Options of text generation.

    Attributes:
        max_new_tokens: maximum length of the answer in tokens.
        temperature: None or 0 for greedy decoding; above 0 tokens are sampled, and lower values are
            more deterministic.
        top_k: sample from the `top_k` most likely tokens only.
        top_p: sample from the smallest set of most likely tokens with this total probability.
        repetition_penalty: values above 1 make tokens that already occurred less likely.
        seed: the same seed gives the same sampled answer.
        stop_words: texts that end the answer, in addition to those of the template.
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
            "temperature": (lambda v: v >= 0, "0 (greedy) or more"),
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
            raise ConfigError(listed("generation options:", wrong))

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled rather than chosen greedily."""
        return bool(self.temperature)

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Options that are set but have no effect with greedy decoding."""
        sampling = ("top_k", "top_p", "seed")
        return () if self.samples else tuple(n for n in sampling if getattr(self, n) is not None)


Within = Callable[[Callable[[], Any]], Any]
"""Calls a function that runs the model, and returns its result."""


def _plainly(run: Callable[[], Any]) -> Any:
    return run()


def stream(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    messages: Sequence[Message],
    options: GenerationOptions,
    tools: Sequence[Mapping[str, Any]] = (),
    vision: ImageInput | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
    within: Within | None = None,
) -> Generator[str, None, None]:
    """Yield the assistant's answer to `messages` in pieces.

    `model` may be in training mode: it is switched to evaluation mode and back. With `tools` the
    prompt shows them, and tokens that mark calls are part of the answer's text. `vision` embeds the
    images of the messages. `agree` maps each chosen id ``[1]`` to the one that is taken: where
    several processes generate together, that of rank 0. `within` calls what runs the model, inside
    of whatever gathers sharded weights.

    Raises:
        ModelError: the messages leave no room in the model's context.
        DataError: the template does not support these messages.
    """
    within = within or _plainly
    prompt = template.prompt_ids(messages, tools=tools)
    prompt = vision.expanded(prompt, messages) if vision else prompt
    room = room_for_answer(model, prompt)
    ends = end_tokens(model, tokenizer, template, options)
    words = StopWords([*template.stop_words, *options.stop_words])
    text = Detokenizer(tokenizer, keep=call_markers(template) if tools else ())
    with generation_mode(model):
        with packed.without_cudnn(next(model.parameters()).device):
            first = within(lambda: vision.inputs(prompt, messages) if vision else {})
        choose = chooser(options, next(model.parameters()).device)
        ids = token_ids(model, prompt, choose, first, agree, within)
        for _, token_id in zip(range(min(room, options.max_new_tokens)), ids, strict=False):
            if token_id in ends:
                break
            if piece := words.add(text.add(token_id)):
                yield piece
            if words.found:
                return
    if rest := words.add(text.rest()) + words.rest():
        yield rest


def call_markers(template: Template) -> tuple[str, ...]:
    """Strings that may be special tokens and mark tool calls."""
    family = template.tool_family
    return family.markers if family else ()


def room_for_answer(model: Any, prompt: Sequence[int]) -> int:
    """The number of tokens left for an answer to `prompt` in the context of `model`.

    Raises:
        ModelError: no token is left.
    """
    limit = context_length(model)
    if len(prompt) >= limit:
        raise ModelError(
            f"the conversation has {len(prompt)} tokens, but the context length of the model is "
            f"{limit}: shorten the conversation"
        )
    return limit - len(prompt)


def context_length(model: Any) -> int:
    """The context length of `model` in tokens; 2**40 if the configuration does not say."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**40)


@contextmanager
def generation_mode(model: Any) -> Iterator[None]:
    """Prepare `model` for generation inside the block and restore it afterwards.

    Evaluation mode disables dropout and gradient checkpointing; xtuner's attention for packed rows,
    which does not support a cache, is replaced by one that does.
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


def token_ids(
    model: Any,
    prompt: list[int],
    choose: Callable[[Tensor, Tensor], Tensor],
    first: Mapping[str, Any],
    agree: Callable[[Tensor], Tensor] | None = None,
    within: Within = _plainly,
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, without end.

    Args:
        model: in generation mode.
        prompt: token ids.
        choose: see `chooser`.
        first: the model inputs of a prompt with images.
        agree, within: see `stream`.
    """
    embedding = model.get_input_embeddings().weight
    device = next(model.parameters()).device  # the embedding may be on another device
    # The id of the image token may be outside the vocabulary; the repetition penalty skips it.
    words = [i for i in prompt if i < embedding.shape[0]] if first else prompt
    seen = torch.tensor([words], device=device)
    step, cache = seen, None
    inputs: dict[str, Any] = dict(first) or {"input_ids": step}
    positions: Tensor | None = first.get("position_ids")
    extra: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    cached = takes(model, "past_key_values")  # state-space models have another kind of cache
    while True:
        # Restored before each yield, so that the caller runs in its own grad mode and SDPA backend.
        with torch.no_grad(), packed.without_cudnn(device):
            if cached:
                extra["past_key_values"] = cache
            output = within(functools.partial(model, **inputs, use_cache=cached, **extra))
            trim_if_grown()
            chosen = choose(seen, output.logits[:, -1].float())
            chosen = agree(chosen) if agree else chosen
        yield int(chosen)
        seen = torch.cat([seen, chosen[:, None]], dim=1)
        cache = output.past_key_values if cached else None
        step = seen if cache is None else chosen[:, None]
        inputs = {"input_ids": step}
        if positions is not None:
            positions = positions[..., -1:] + 1
            inputs["position_ids"] = positions


def takes(model: Any, argument: str) -> bool:
    """Whether the forward pass of `model` has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


_LEAST_TEMPERATURE = 1e-4
"""Divided by less, logits become infinite, and their softmax not a number."""


def chooser(options: GenerationOptions, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from (ids so far ``[1, T]``, logits ``[1, V]``) to the next id ``[1]``."""
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
    temperature = max(float(options.temperature or 1.0), _LEAST_TEMPERATURE)
    steps.append(TemperatureLogitsWarper(temperature))
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
    """Ids that end an answer, from the template, the tokenizer and the model."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    vocabulary = tokenizer.get_added_vocab()
    # Special tokens are not decoded, so as stop words they are matched by id.
    special = [vocabulary.get(word) for word in options.stop_words]
    ids = [*template.stop_token_ids, tokenizer.eos_token_id, *declared, *special]
    return frozenset(token_id for token_id in ids if token_id is not None)
