"""Answer several conversations at once: one forward pass per token for all of them.

Greedy answers equal those of `generate.stream`, unless batching changes the model's rounding.
Models that cannot take a padded batch answer one conversation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from xtuner.generation.generate import GenerationOptions, begin, call_markers, generation_mode
from xtuner.generation.running import OneByOne, RunningBatch, takes_batches
from xtuner.templates.base import Template
from xtuner.types import Message


def generate_batch(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    options: GenerationOptions,
    tools: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> list[str]:
    """The assistant's answers to `conversations`, in their order.

    Args:
        model: A causal language model; its training mode is restored afterwards.
        conversations: Messages without images.
        options: Options of every answer; with a seed each row has its own random generator.
        tools: The tools of each conversation, if any.

    Raises:
        ModelError: A conversation leaves no room in the model's context.
        DataError: The template does not support a conversation.
    """
    tools = tools or [()] * len(conversations)
    return continue_prompts(
        model,
        tokenizer,
        template=template,
        prompts=[
            template.prompt_ids(messages, tools=shown)
            for messages, shown in zip(conversations, tools, strict=True)
        ],
        options=options,
        keep=[call_markers(template) if shown else () for shown in tools],
    )


def continue_prompts(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    keep: Sequence[Sequence[str]] = (),
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """The answers to `prompts`, which are token ids, in their order.

    Args:
        model: A causal language model; its training mode is restored afterwards.
        prompts: Token ids, each up to where the answer begins.
        options: Options of every answer; with a seed each row has its own random generator.
        keep: Special tokens of each answer that are part of its text, if any.
        agree: Maps each chosen id ``[1]`` to the one that is taken: where several processes
            generate together, that of rank 0.

    Raises:
        ModelError: A prompt leaves no room in the model's context.
    """
    if not prompts:
        return []
    rows = [
        begin(model, tokenizer, template, prompt, options, keep=kept, agree=agree)
        for prompt, kept in zip(prompts, keep or [()] * len(prompts), strict=True)
    ]
    texts = {id(row): "" for row in rows}
    with generation_mode(model):
        batch = RunningBatch(model) if takes_batches(model) else OneByOne(model)
        found = batch.admit(rows)
        while True:
            for row, piece in found:
                texts[id(row)] += piece
            if not batch.rows:
                return [texts[id(row)] for row in rows]
            found = batch.step()
