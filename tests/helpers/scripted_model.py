"""A model that emits given ids, so that answers are known exactly."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class ScriptedModel(nn.Module):
    """Emits `ids` one after the other, whatever the prompt; `length` is its context."""

    def __init__(self, ids: list[int], *, length: int = 4096, fails_at: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 1)
        self.ids, self.fails_at = ids, fails_at
        self.prompts: list[list[int]] = []
        self.at = 0
        self.config = SimpleNamespace(max_position_embeddings=length, _attn_implementation="sdpa")
        self.config.get_text_config = lambda: self.config
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        if past_key_values is None:
            self.at = 0
            self.prompts.append(input_ids[0].tolist())
        if self.at == self.fails_at:
            raise RuntimeError("the model broke")
        logits = torch.zeros(1, 1, 300)
        logits[0, 0, self.ids[self.at % len(self.ids)]] = 9.0
        self.at += 1
        return SimpleNamespace(logits=logits, past_key_values="cache")


class Answers(ScriptedModel):
    """Returns one answer after the other."""

    def __init__(self, tokenizer: Any, *answers: str) -> None:
        super().__init__([])
        self.answers = [tokenizer(f"{answer}<|im_end|>")["input_ids"] for answer in answers]

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        if past_key_values is None:
            self.ids = self.answers.pop(0)
        return super().forward(input_ids, past_key_values, use_cache)
