"""Answer several conversations at once: one forward pass per token for all of them.

    prompts ──left padding──► [B, T] ──model, KV cache──► one id per row, until each row has ended

Prompts are padded on the left, and the padding is masked; a row counts its positions from its own
first token. Where the model's batched results round as its single ones do, greedy answers are those
of `generate.stream`. Models that cannot take a padded batch answer one conversation at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.generation.detokenize import Detokenizer, StopWords
from xtuner.generation.generate import (
    GenerationOptions,
    chooser,
    end_tokens,
    generation_mode,
    room_for_answer,
    stream,
    takes,
    token_ids,
)
from xtuner.kernels.attention import packed
from xtuner.templates.base import Template
from xtuner.types import Message

NEEDED = ("attention_mask", "position_ids", "past_key_values", "use_cache")
"""Arguments of a model that takes left-padded batches."""


class _Row:
    """An unfinished answer."""

    def __init__(
        self,
        prompt: list[int],
        *,
        tokenizer: Any,
        words: StopWords,
        limit: int,
        choose: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.ids, self.limit, self.choose = list(prompt), limit, choose
        self._words, self._detokenizer = words, Detokenizer(tokenizer)
        self._pieces: list[str] = []
        self._count = 0
        self.ended = False

    def add(self, token_id: int, ends: frozenset[int]) -> None:
        """Append a token; the row ends at an end token, a stop word or its limit."""
        self._count += 1
        if token_id in ends:
            self.ended = True
            return
        self.ids.append(token_id)
        self._pieces.append(self._words.add(self._detokenizer.add(token_id)))
        self.ended = self._words.found or self._count >= self.limit

    def text(self) -> str:
        """The answer so far, complete characters only."""
        rest = self._words.add(self._detokenizer.rest()) + self._words.rest()
        return "".join([*self._pieces, rest])


def takes_batches(model: Any) -> bool:
    """Whether `model` can answer several prompts of different lengths at once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", False):  # recurrent states cannot mask padding
        return False
    parameters = inspect.signature(base.forward).parameters
    return all(name in parameters for name in NEEDED)


def generate_batch(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    options: GenerationOptions,
) -> list[str]:
    """The assistant's answers to `conversations`, in their order.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer of the model.
        template: the chat template.
        conversations: messages without images.
        options: options of every answer; with a seed each row has its own random generator.

    Raises:
        ModelError: a conversation leaves no room in the model's context.
        DataError: the template does not support a conversation.
    """
    if len(conversations) < 2 or not takes_batches(model):
        return [
            "".join(stream(model, tokenizer, template=template, messages=messages, options=options))
            for messages in conversations
        ]
    return continue_prompts(
        model,
        tokenizer,
        template=template,
        prompts=[template.prompt_ids(messages) for messages in conversations],
        options=options,
    )


def continue_prompts(
    model: Any,
    tokenizer: Any,
    *,
    template: Template,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """The answers to `prompts`, which are token ids, in their order.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: the tokenizer of the model.
        template: the chat template.
        prompts: token ids, each up to where the answer begins.
        options: options of every answer; with a seed each row has its own random generator.
        agree: maps the chosen ids ``[B]`` to those that are taken: where several processes generate
            together, those of rank 0.

    Raises:
        ModelError: a prompt leaves no room in the model's context.
    """
    device = next(model.parameters()).device
    rows = [
        _Row(
            list(prompt),
            tokenizer=tokenizer,
            words=StopWords([*template.stop_words, *options.stop_words]),
            limit=min(options.max_new_tokens, room_for_answer(model, prompt)),
            choose=chooser(options, device),
        )
        for prompt in prompts
    ]
    ends = end_tokens(model, tokenizer, template, options)
    batches = [rows] if len(rows) > 1 and takes_batches(model) else [[row] for row in rows]
    with generation_mode(model), packed.without_cudnn(device):
        for batch in batches:
            if takes_batches(model):
                _fill(model, batch, ends, device, agree)
            else:
                _fill_one(model, batch[0], ends, options, agree)
    return [row.text() for row in rows]


def _fill_one(
    model: Any,
    row: _Row,
    ends: frozenset[int],
    options: GenerationOptions,
    agree: Callable[[Tensor], Tensor] | None,
) -> None:
    """Generate one answer by a model that takes no padded batch."""
    for token_id in token_ids(model, list(row.ids), options, {}, agree):
        row.add(token_id, ends)
        if row.ended:
            return


@torch.no_grad()
def _fill(
    model: Any,
    rows: Sequence[_Row],
    ends: frozenset[int],
    device: torch.device,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Generate until every row has ended; rows that have ended stay in the batch, ignored."""
    longest = max(len(row.ids) for row in rows)
    padding = [longest - len(row.ids) for row in rows]
    pairs = list(zip(rows, padding, strict=True))
    step = torch.tensor([[0] * missing + row.ids for row, missing in pairs], device=device)
    mask = torch.tensor([[0] * missing + [1] * len(row.ids) for row, missing in pairs]).to(device)
    extra = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
    while not all(row.ended for row in rows):
        output = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        scores = output.logits[:, -1].float()
        chosen = [
            0 if row.ended else int(row.choose(torch.tensor([row.ids], device=device), one[None]))
            for row, one in zip(rows, scores, strict=True)
        ]
        chosen = agree(torch.tensor(chosen, device=device)).tolist() if agree else chosen
        for row, token_id in zip(rows, chosen, strict=True):
            if not row.ended:
                row.add(token_id, ends)
        step, cache = torch.tensor(chosen, device=device)[:, None], output.past_key_values
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
