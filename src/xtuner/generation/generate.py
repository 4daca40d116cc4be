"""Generate an answer token by token.

    messages ──template──► prompt ids ──model──► id, id, ... ──► text, until a stop token or word

The loop runs in the caller's thread, so that Ctrl-C, errors and autocast behave as in any other
code. Sampling uses its own random generator: seeded answers are reproducible, and the global random
state does not change. From the model's `generation_config` only the end tokens are used; greedy
answers equal those of `model.generate(do_sample=False)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from xtuner.errors import ConfigError, ModelError, listed
from xtuner.generation.answer import Answer, Choose
from xtuner.generation.detokenize import StopWords
from xtuner.generation.images import ImageInput
from xtuner.generation.running import OneByOne, Within, plainly
from xtuner.kernels.attention import packed
from xtuner.models.vision.llava import decoder_of
from xtuner.templates.base import Template
from xtuner.types import Message


@dataclass(frozen=True)
class GenerationOptions:
    """Options of text generation.

    Attributes:
        max_new_tokens: Maximum length of the answer in tokens.
        temperature: None or 0 for greedy decoding; above 0 tokens are sampled, and lower values are
            more deterministic.
        top_k: Sample from the `top_k` most likely tokens only.
        top_p: Sample from the smallest set of most likely tokens with this total probability.
        repetition_penalty: Values above 1 make tokens that already occurred less likely.
        seed: The same seed gives the same sampled answer.
        stop_words: Texts that end the answer, in addition to those of the template.
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
    images of the messages. `agree` maps each chosen id ``[1]`` to the one to use: that of
    rank 0 if several processes generate together. `within` runs each forward pass inside the module
    that gathers sharded weights.

    Raises:
        ModelError: The messages leave no room in the model's context.
        DataError: The template does not support these messages.
    """
    within = within or plainly
    prompt = template.prompt_ids(messages, tools=tools)
    prompt = vision.expanded(prompt, messages) if vision else prompt
    keep = call_markers(template) if tools else ()
    row = begin(model, tokenizer, template, prompt, options, keep=keep, agree=agree)
    with generation_mode(model):
        if vision is not None:
            with packed.without_cudnn(next(model.parameters()).device):
                row.inputs = within(functools.partial(vision.inputs, prompt, messages))
        batch = OneByOne(model, within)
        batch.admit([row])
        while batch.rows:
            ((_, piece),) = batch.step()
            if piece:
                yield piece


def begin(
    model: Any,
    tokenizer: Any,
    template: Template,
    prompt: Sequence[int],
    options: GenerationOptions,
    *,
    inputs: Mapping[str, Any] | None = None,
    top_logprobs: int | None = None,
    keep: Collection[str] = (),
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Answer:
    """Start an answer of `model` to the token ids `prompt`; it has no token yet.

    Args:
        model: The model that will generate the answer.
        template: Determines the tokens and words that end the answer.
        prompt: Token ids, with those of images.
        options: Options of the answer; with a seed it has its own random generator.
        inputs, top_logprobs, keep: See `Answer`.
        agree: See `stream`.

    Raises:
        ModelError: The prompt leaves no room in the model's context.
    """
    choose = chooser(options, next(model.parameters()).device)
    return Answer(
        prompt,
        tokenizer=tokenizer,
        words=StopWords([*template.stop_words, *options.stop_words]),
        ends=end_tokens(model, tokenizer, template, options),
        limit=min(options.max_new_tokens, room_for_answer(model, prompt)),
        choose=(lambda ids, scores: agree(choose(ids, scores))) if agree else choose,
        inputs=inputs,
        top_logprobs=top_logprobs,
        keep=keep,
    )


def call_markers(template: Template) -> tuple[str, ...]:
    """Strings that may be special tokens and mark tool calls."""
    family = template.tool_family
    return family.markers if family else ()


def room_for_answer(model: Any, prompt: Sequence[int]) -> int:
    """The number of tokens left for an answer to `prompt` in the context of `model`.

    Raises:
        ModelError: No token is left.
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
    which does not support a cache, is replaced by one that does. The output head gets contiguous
    inputs.
    """
    base = decoder_of(model)
    training = [module for module in model.modules() if module.training]
    before = base.config._attn_implementation
    head = getattr(model, "get_output_embeddings", lambda: None)()
    contiguous = head.register_forward_pre_hook(_contiguous) if head is not None else None
    model.eval()
    try:
        if before == packed.NAME:
            base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        yield
    finally:
        if before == packed.NAME:
            base.set_attn_implementation(before)
        if contiguous is not None:
            contiguous.remove()
        for module in training:
            module.training = True


def _contiguous(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of `head`, contiguous.

    `logits_to_keep` gives it the last positions of a batch, which are not adjacent in memory. For
    such an input ``[B, 1, H]`` torch (2.13) copies the weight B times on a CPU: 27 s and 3 GB for 8
    prompts and a vocabulary of 92,544, instead of 0.04 s.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


_LEAST_TEMPERATURE = 1e-4
"""Divided by less, logits become infinite, and their softmax not a number."""


def chooser(options: GenerationOptions, device: torch.device) -> Choose:
    """A function from the ids so far and logits ``[1, V]`` to the next id ``[1]``."""
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

    def processed(ids: Sequence[int], scores: Tensor) -> Tensor:
        # Only the repetition penalty reads the ids. That of an image is outside the vocabulary.
        known = {i for i in ids if i < scores.shape[-1]} if options.repetition_penalty else ()
        return cast(Tensor, steps(torch.tensor([[*known]], device=device).long(), scores))

    if not options.samples:
        return lambda ids, scores: processed(ids, scores).argmax(dim=-1)
    temperature = max(float(options.temperature or 1.0), _LEAST_TEMPERATURE)
    steps.append(TemperatureLogitsWarper(temperature))
    if options.top_k is not None:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        steps.append(TopPLogitsWarper(float(options.top_p)))
    generator = torch.Generator(device)
    generator.manual_seed(options.seed) if options.seed is not None else generator.seed()

    def draw(ids: Sequence[int], scores: Tensor) -> Tensor:
        probabilities = processed(ids, scores).softmax(dim=-1)
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
