"""OpenAI's API over HTTP: /v1/models, /v1/chat/completions and /v1/completions.

    body ──requests──► prompt ids ──Job──► Engine ──events──► JSON, or server-sent events

A client that disconnects cancels its jobs, whose slots are free after the current token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from xtuner.errors import LaunchError, XTunerError
from xtuner.generation.answer import TokenScore
from xtuner.generation.generate import GenerationOptions
from xtuner.serve.engine import Engine, facts
from xtuner.serve.job import Done, Event, Failed, Job, OverloadedError, Piece, TookTooLongError
from xtuner.serve.models import ServedModel
from xtuner.serve.prompts import ImageStore, messages_of, prompt_ids, text_ids
from xtuner.serve.replies import CallReader, Reply, finish_of
from xtuner.serve.requests import ChatRequest, CompletionRequest, read_tools
from xtuner.types import Message

_POLL_SECONDS = 0.5
_CLIENT_CLOSED = 499


@dataclass(frozen=True)
class Defaults:
    """Defaults for parameters that a request does not set.

    Attributes:
        max_tokens: Limit for every answer, also where a request asks for more.
        temperature: Temperature of requests that do not set one; OpenAI's default is 1.
    """

    max_tokens: int = 4096
    temperature: float = 1.0


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The error that the client sees for `error`."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, OverloadedError):
            return cls(429, str(error), code="overloaded")
        if isinstance(error, TookTooLongError):
            return cls(504, str(error), code="timeout")
        if isinstance(error, LaunchError):
            return cls(503, str(error), code="unavailable")
        if isinstance(error, XTunerError):
            code = "context_length_exceeded" if "context length" in str(error) else "invalid_value"
            return cls(400, str(error), code=code)
        return cls(500, "internal error; the server's log has the details", code="internal_error")

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param or None,
            "code": self.code or None,
        }
        return {"error": error}

    def response(self) -> Response:
        """The response."""
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers=headers)


def make_app(
    models: Sequence[ServedModel], engine: Engine, defaults: Defaults = Defaults()
) -> FastAPI:
    """The application that serves `models`; the caller closes `engine`."""
    app = FastAPI(title="xtuner", docs_url=None, redoc_url=None, openapi_url=None)
    by_name = {model.name: model for model in models}
    _handle_errors(app)

    @app.get("/health")
    async def health() -> Mapping[str, Any]:
        return facts(engine)

    @app.get("/v1/models")
    async def list_models() -> Mapping[str, Any]:
        return {"object": "list", "data": [_card(model) for model in models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Mapping[str, Any]:
        return _card(_find(by_name, name))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = _find(by_name, body.model)
        stack = contextlib.ExitStack()
        try:
            images = stack.enter_context(ImageStore.temporary())
            messages = await run_in_threadpool(messages_of, body.messages, served, images)
            tools = read_tools(body)
            prompt = await run_in_threadpool(prompt_ids, served, messages, tools)
            reply = Reply("chat", served.name, served.tokenizer)
            answering = _Answering(engine, served, reply, tools)
            answering.ask([prompt], body, defaults, messages=messages)
            return await answering.response(request, stack)
        except BaseException:
            stack.close()
            raise

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = _find(by_name, body.model)
        prompts = [await run_in_threadpool(text_ids, served, text) for text in body.prompts()]
        answering = _Answering(engine, served, Reply("text", served.name, served.tokenizer))
        answering.ask(prompts, body, defaults)
        return await answering.response(request, contextlib.ExitStack())

    return app


class _Answering:
    """The answers to one request."""

    def __init__(
        self,
        engine: Engine,
        served: ServedModel,
        reply: Reply,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        family = served.template.tool_family if tools else None
        self._calls = CallReader(family, tools) if family else None
        self._engine, self._served, self._reply = engine, served, reply
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._scored = self._usage = self._streamed = False
        self._num_prompts = 1

    def ask(
        self,
        prompts: Sequence[list[int]],
        body: ChatRequest | CompletionRequest,
        defaults: Defaults,
        *,
        messages: Sequence[Message] = (),
    ) -> None:
        """Submit a job for each answer; none if the queue has no room for all."""
        self._num_prompts = len(prompts)
        self._scored, self._usage = body.alternatives is not None, body.include_usage
        self._streamed = bool(body.stream)
        count = body.n or 1
        try:
            for index in range(len(prompts) * count):
                options = body.options(
                    limit=defaults.max_tokens,
                    temperature=defaults.temperature,
                    number=index % count,
                )
                self._submit(prompts[index // count], options, body.alternatives, messages)
        except BaseException:
            self._cancel()
            raise

    def _submit(
        self,
        prompt: list[int],
        options: GenerationOptions,
        alternatives: int | None,
        messages: Sequence[Message],
    ) -> None:
        deliver = self._deliver(asyncio.get_running_loop(), len(self._jobs))
        has_images = any(message.images for message in messages)
        job = Job(
            self._served,
            prompt,
            options,
            deliver,
            messages=messages if has_images else (),
            top_logprobs=alternatives,
            keep=self._calls.markers if self._calls else (),
        )
        self._engine.submit(job)
        self._jobs.append(job)

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no client is connected
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    async def response(self, request: Request, resources: contextlib.ExitStack) -> Response:
        """The response; `resources` are released when the answers are complete."""
        try:
            first = await self._next(request)
            if isinstance(first[1], Failed):
                raise ApiError.of(first[1].error)
            if self._streamed:
                return StreamingResponse(
                    self._stream(first, resources),
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                )
            body = await self._complete(first, request)
        except BaseException:
            self._cancel()
            raise
        resources.close()
        return JSONResponse(body)

    async def _complete(self, first: tuple[int, Event], request: Request) -> Any:
        texts = ["" for _ in self._jobs]
        scores: list[list[TokenScore]] = [[] for _ in self._jobs]
        done: dict[int, Done] = {}
        index, event = first
        while True:
            if isinstance(event, Failed):
                raise ApiError.of(event.error)
            if isinstance(event, Piece):
                texts[index] += event.text
                scores[index] += event.scores
            else:
                done[index] = event
                if len(done) == len(self._jobs):
                    break
            index, event = await self._next(request)
        calls: list[list[Mapping[str, Any]]] = [[] for _ in texts]
        if self._calls:
            for number, text in enumerate(texts):
                texts[number], calls[number] = self._calls.separated(text)
        return self._reply.complete(
            texts,
            [scored if self._scored else None for scored in scores],
            [done[i] for i in range(len(self._jobs))],
            num_prompts=self._num_prompts,
            calls=calls,
        )

    async def _stream(
        self, first: tuple[int, Event], resources: contextlib.ExitStack
    ) -> AsyncIterator[str]:
        """Server-sent events until all answers are complete; ends when the client disconnects."""
        done: dict[int, Done] = {}
        try:
            for index in range(len(self._jobs)):
                if opening := self._reply.opening(index):
                    yield _event(opening)
            index, event = first
            while True:
                if isinstance(event, Failed):
                    yield _event(ApiError.of(event.error).body())
                    return
                if self._calls:
                    piece = event.text if isinstance(event, Piece) else None
                    for text, call, number in self._calls.read(index, piece):
                        if call is not None:
                            yield _event(self._reply.call(index, call, number))
                        elif text:
                            yield _event(self._reply.piece(index, text, None))
                elif isinstance(event, Piece):
                    yield _event(
                        self._reply.piece(index, event.text, event.scores if self._scored else None)
                    )
                if isinstance(event, Done):
                    done[index] = event
                    called = self._calls is not None and self._calls.called(index)
                    yield _event(self._reply.end(index, finish_of(event, called=called)))
                    if len(done) == len(self._jobs):
                        break
                index, event = await self._events.get()
            if self._usage:
                ends = [done[i] for i in range(len(self._jobs))]
                yield _event(self._reply.total(ends, num_prompts=self._num_prompts))
            yield "data: [DONE]\n\n"
        finally:
            self._cancel()
            resources.close()

    async def _next(self, request: Request) -> tuple[int, Event]:
        """The next event; an error if the client disconnects in the meantime."""
        while True:
            try:
                return await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ApiError(_CLIENT_CLOSED, "the client closed the connection") from None

    def _cancel(self) -> None:
        for job in self._jobs:
            self._engine.cancel(job)


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _card(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "xtuner"}


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    if name in models:
        return models[name]
    raise ApiError(
        404,
        f"the model {name!r:.200} is not served; available: {', '.join(models)}",
        code="model_not_found",
        param="model",
    )


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [_problem(each) for each in error.errors()]
        param = str(error.errors()[0]["loc"][1]) if len(error.errors()[0]["loc"]) > 1 else ""
        return ApiError(400, "; ".join(problems), param=param, code="invalid_value").response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == 404 else "invalid_request"
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, code=code).response()

    async def other(request: Request, error: Exception) -> Response:
        return ApiError.of(error).response()

    for kind in (ApiError, XTunerError, Exception):
        app.add_exception_handler(kind, other)


def _problem(error: Mapping[str, Any]) -> str:
    """One problem of a request: its field and what is wrong with it."""
    where = ".".join(str(part) for part in error["loc"][1:])
    what = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        what = "is not a parameter of this API"
    return f"{where}: {what}" if where else what
