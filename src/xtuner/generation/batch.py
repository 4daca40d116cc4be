"""Answer several conversations at once: one forward pass per token for all of them.

Where the model's batched results round as its single ones do, greedy answers are those of
`generate.stream`. Models that cannot take a padded batch answer one conversation at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.generation.answer import Answer
from xtuner.generation.detokenize import StopWords
from xtuner.generation.generate import (
    GenerationOptions,
    call_markers,
    chooser,
    end_tokens,
    generation_mode,
    room_for_answer,
    stream,
)
from xtuner.generation.running import RunningBatch, takes_batches
from xtuner.templates.base import Template
from xtuner.types import Message

__all__ = ["generate_batch", "takes_batches"]


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
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer of the model.
        template: the chat template.
        conversations: messages without images.
        options: options of every answer; with a seed each row has its own random generator.
        tools: the tools of each conversation, if any.

    Raises:
        ModelError: a conversation leaves no room in the model's context.
        DataError: the template does not support a conversation.
    """
    tools = tools or [()] * len(conversations)
    if len(conversations) < 2 or not takes_batches(model):
        return [
            "".join(
                stream(
                    model,
                    tokenizer,
                    template=template,
                    messages=messages,
                    options=options,
                    tools=shown,
                )
            )
            for messages, shown in zip(conversations, tools, strict=True)
        ]
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer, template, options)
    rows = []
    for messages, shown in zip(conversations, tools, strict=True):
        prompt = template.prompt_ids(messages, tools=shown)
        rows.append(
            Answer(
                prompt,
                tokenizer=tokenizer,
                words=StopWords([*template.stop_words, *options.stop_words]),
                ends=ends,
                limit=min(options.max_new_tokens, room_for_answer(model, prompt)),
                choose=chooser(options, device),
                keep=call_markers(template) if shown else (),
            )
        )
    texts = {id(row): "" for row in rows}
    with generation_mode(model):
        batch = RunningBatch(model)
        found = batch.admit(rows)
        while True:
            for row, piece in found:
                texts[id(row)] += piece
            if not batch.rows:
                return [texts[id(row)] for row in rows]
            found = batch.step()
