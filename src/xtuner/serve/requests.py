"""Requests of OpenAI's API, checked, and what they ask for in xtuner's terms.

A parameter that has no effect here is refused rather than ignored, unless it has its default value.
Fields that only carry information for the service (`user`, `metadata`, ...) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from xtuner.calls.read import CallFormatError, read_tool
from xtuner.errors import ConfigError
from xtuner.generation.generate import GenerationOptions

MOST_ANSWERS = 8
MOST_TOOLS = 128
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "parallel_tool_calls": (True, False, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
}
"""Parameters of OpenAI's API that have no effect here, with the values that are accepted."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ImageUrl(_Strict):
    """An image, as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Part(_Strict):
    """A part of a message: text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _complete(self) -> Part:
        if (self.text is None) == (self.type == "text"):
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}, alone")
        if (self.image_url is None) == (self.type == "image_url"):
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}, alone")
        return self


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None


class _Request(_Strict):
    """Fields of both kinds of requests."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_has_an_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = cls.model_fields
        for name, allowed in _ONLY.items():
            if name not in own and values.get(name) not in allowed:
                shown = " or ".join(repr(value) for value in allowed if value is not None)
                raise ValueError(f"{name} is not supported; leave it out, or send {shown}")
        known = {*_IGNORED, *_ONLY} - set(own)
        return {name: value for name, value in values.items() if name not in known}

    def options(self, *, limit: int, temperature: float, number: int = 0) -> GenerationOptions:
        """Options of answer `number` of the request.

        Args:
            limit: Maximum tokens of an answer.
            temperature: Temperature of requests that do not set one.
            number: Index among several answers, each of which has its own seed.

        Raises:
            ConfigError: Options contradict each other.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationOptions(
            max_new_tokens=min(self.most_tokens or limit, limit),
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + number) % 2**63,
            stop_words=tuple(word for word in stop if word),
        )

    @property
    def most_tokens(self) -> int | None:
        """Maximum tokens of an answer, as the client asks."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """See `_Request.most_tokens`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report of each token; None reports no scores."""
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs has no effect without logprobs = true")
        return (self.top_logprobs or 0) if self.logprobs else None


def read_tools(body: ChatRequest) -> tuple[Mapping[str, Any], ...]:
    """The tools that the model may call.

    Raises:
        ConfigError: One is not a tool.
    """
    if body.tool_choice == "none":
        return ()
    try:
        return tuple(read_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ()))
    except CallFormatError as error:
        raise ConfigError(str(error)) from error


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report of each token; None reports no scores."""
        return self.logprobs

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts: texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(i) for i in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]
