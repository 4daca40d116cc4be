"""Answers in OpenAI's form: complete ones, and the chunks of streamed ones."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xtuner.calls.families.base import Family, Parser, Prose
from xtuner.calls.read import arguments_of, name_of
from xtuner.generation.answer import TokenScore
from xtuner.serve.job import Done


def finish_of(done: Done, *, called: bool) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if called and done.finish == "stop" else done.finish


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A call in OpenAI's form, whose arguments are JSON text."""
    arguments = json.dumps(arguments_of(call), ensure_ascii=False)
    function = {"name": name_of(call), "arguments": arguments}
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": function}


class CallReader:
    """Separates the calls of the answers to one request from their text.

    Args:
        family: How the model writes calls.
        tools: The tools of the request.
    """

    def __init__(self, family: Family, tools: Sequence[Mapping[str, Any]]) -> None:
        self._family, self._tools = family, tools
        self._parsers: dict[int, Parser] = {}
        self._counts: dict[int, int] = {}

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that mark calls."""
        return self._family.markers

    def separated(self, text: str) -> tuple[str, list[Mapping[str, Any]]]:
        """The text and the calls of a complete answer; what cannot be read stays text."""
        reader = CallReader(self._family, self._tools)
        parts = [*reader.read(0, text), *reader.read(0, None)]
        text = "".join(part for part, _, _ in parts)
        return text.rstrip("\n"), [call for _, call, _ in parts if call is not None]

    def read(
        self, index: int, piece: str | None
    ) -> Iterator[tuple[str, Mapping[str, Any] | None, int]]:
        """What `piece` of answer `index` completes, None at its end: text, or a call and its
        number."""
        parser = self._parsers.setdefault(index, Parser(self._family, self._tools))
        for event in parser.finish() if piece is None else parser.add(piece):
            if isinstance(event, Prose) or event.call is None:
                yield event.text, None, 0
            else:
                number = self._counts.get(index, 0)
                self._counts[index] = number + 1
                yield "", event.call, number

    def called(self, index: int) -> bool:
        """Whether answer `index` has a call so far."""
        return index in self._counts


class Reply:
    """The form of the answers to one request.

    Args:
        kind: 'chat' or 'text'.
        model: The model's name.
        tokenizer: Decodes the tokens of log-probabilities.
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
        calls: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> dict[str, Any]:
        """The response with all answers; several answers share each of the prompts."""
        choices = []
        for index, (text, scored, end) in enumerate(zip(texts, scores, done, strict=True)):
            called = calls[index] if calls else ()
            finish = finish_of(end, called=bool(called))
            choice: dict[str, Any] = {"index": index, "finish_reason": finish}
            choice["logprobs"] = None if scored is None else self.logprobs(scored)
            if self._chat:
                content = text if text or not called else None
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
                if called:
                    numbered = enumerate(called)
                    choice["message"]["tool_calls"] = [_call(call, i) for i, call in numbered]
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

    def call(self, index: int, call: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A chunk with call `number` of an answer."""
        delta = {"tool_calls": [{"index": number, **_call(call, number)}]}
        return self._chunk(index, delta=delta)

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
