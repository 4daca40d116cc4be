"""Answers in OpenAI's form: complete ones, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from xtuner.generation.answer import TokenScore
from xtuner.serve.engine import Done


class Reply:
    """The form of the answers to one request.

    Args:
        kind: 'chat' or 'text'.
        model: the model's name.
        tokenizer: decodes the tokens of log-probabilities.
    """

    def __init__(self, kind: str, model: str, tokenizer: Any) -> None:
        self._chat, self._tokenizer = kind == "chat", tokenizer
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._common = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def complete(
        self,
        texts: Sequence[str],
        scores: Sequence[Sequence[TokenScore] | None],
        done: Sequence[Done],
        *,
        num_prompts: int = 1,
    ) -> dict[str, Any]:
        """The response with all answers; several answers share each of the prompts."""
        choices = []
        for index, (text, scored, end) in enumerate(zip(texts, scores, done, strict=True)):
            choice: dict[str, Any] = {"index": index, "finish_reason": end.finish}
            choice["logprobs"] = None if scored is None else self.logprobs(scored)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        usage = self.usage(done, num_prompts=num_prompts)
        return {**self._common, "object": kind, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of an answer; a completion has none."""
        if not self._chat:
            return None
        return self._chunk(index, delta={"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        """A chunk with text."""
        logprobs = None if scores is None else self.logprobs(scores)
        if self._chat:
            return self._chunk(index, delta={"content": text}, logprobs=logprobs)
        return self._chunk(index, text=text, logprobs=logprobs)

    def end(self, index: int, finish: str) -> dict[str, Any]:
        """The last chunk of an answer."""
        if self._chat:
            return self._chunk(index, finish=finish, delta={})
        return self._chunk(index, finish=finish, text="")

    def total(self, done: Sequence[Done], *, num_prompts: int = 1) -> dict[str, Any]:
        """The chunk with the number of tokens, after all answers."""
        usage = self.usage(done, num_prompts=num_prompts)
        return {**self._common, "object": self._kind, "choices": [], "usage": usage}

    def usage(self, done: Sequence[Done], *, num_prompts: int) -> dict[str, int]:
        """The number of tokens; a prompt with several answers counts once."""
        per_prompt = max(1, len(done) // num_prompts)
        prompt = sum(end.num_prompt for end in done[::per_prompt])
        generated = sum(end.num_generated for end in done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, index: int, *, finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": finish, "logprobs": None, **more}
        return {**self._common, "object": self._kind, "choices": [choice]}

    def logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The log-probabilities of tokens."""
        if self._chat:
            return {"content": [self._of_token(score) for score in scores], "refusal": None}
        texts = [self._text(score.token_id) for score in scores]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self._text(i): v for i, v in score.top} for score in scores],
            "text_offset": offsets,
        }

    def _of_token(self, score: TokenScore) -> dict[str, Any]:
        top = [self._entry(token_id, value) for token_id, value in score.top]
        return {**self._entry(score.token_id, score.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
