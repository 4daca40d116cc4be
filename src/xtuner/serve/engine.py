"""Generate the answers of several requests in one thread.

    submit ──► queue ──► admitted while there are slots ──► one token each per round ──► events

Requests of one model and adapter share a batch. The thread owns the models: nobody else calls
them, so that attention, adapters and caches need no locks.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.errors import LaunchError, ModelError, XTunerError, count
from xtuner.generation.answer import Answer
from xtuner.generation.generate import (
    GenerationOptions,
    begin,
    call_markers,
    generation_mode,
    room_for_answer,
)
from xtuner.generation.images import ImageInput
from xtuner.generation.running import OneByOne, RunningBatch
from xtuner.serve.job import (
    Done,
    Event,
    Failed,
    Job,
    Limits,
    OverloadedError,
    Piece,
    TookTooLongError,
)
from xtuner.serve.models import ServedModel, Weights
from xtuner.templates.base import Template
from xtuner.types import Message

logger = logging.getLogger("xtuner.serve")


class Engine:
    """Owns the models and one thread that generates.

    Args:
        limits: What the engine accepts.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._groups: dict[tuple[int, str | None], _Group] = {}
        self._modes: dict[int, contextlib.ExitStack] = {}
        self._num_open = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="xtuner-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue `job`.

        Raises:
            OverloadedError: Too many requests wait.
            ModelError: The prompt fills the model's context.
        """
        room_for_answer(job.model.weights.model, job.prompt)
        with self._lock:
            if self._num_open >= self.limits.max_batch + self.limits.max_queue:
                raise OverloadedError(
                    f"{count(self._num_open, 'request is', 'requests are')} open and the queue is "
                    "full; try again later"
                )
            self._num_open += 1
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Cancel `job`; its slot is free after the current token."""
        job.cancelled = True

    @property
    def num_open(self) -> int:
        """Requests that wait or are being answered."""
        return self._num_open

    def call(self, function: Callable[[], None]) -> None:
        """Call `function` on the engine's thread, between two tokens; wait for it."""
        done = threading.Event()
        fault: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                fault.append(error)
            finally:
                done.set()

        self._inbox.put(run)
        done.wait()
        if fault:
            raise fault[0]

    def forget(self, weights: Weights) -> None:
        """Release `weights`, whose jobs fail; called on the engine's thread."""
        for key in [key for key in self._groups if key[0] == id(weights)]:
            self._groups.pop(key).fail(ModelError("the model was unloaded"), self._close)
        if mode := self._modes.pop(id(weights), None):
            mode.close()

    def close(self) -> None:
        """Stop the thread; open requests fail."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._read_inbox(wait=not self._waiting and not self._groups):
            self._drop_unwanted()
            self._admit()
            for key, group in list(self._groups.items()):
                with group.faults(self._close):
                    group.step(self._close)
                if not group.jobs:
                    self._groups.pop(key, None)
        for group in self._groups.values():
            group.fail(LaunchError("the server is shutting down"), self._close)
        for mode in self._modes.values():
            mode.close()

    def _read_inbox(self, *, wait: bool) -> bool:
        """Take new jobs and calls; False if the engine closes."""
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Job):
                self._waiting.append(item)
            else:
                item()
            wait = False

    def _drop_unwanted(self) -> None:
        """End jobs that were cancelled or took too long."""
        for job in [job for job in self._waiting if self._unwanted(job)]:
            self._waiting.remove(job)
            self._end_unwanted(job)
        for key, group in list(self._groups.items()):
            for job in [job for job in group.jobs.values() if self._unwanted(job)]:
                group.remove(job)
                self._end_unwanted(job)
            if not group.jobs:
                self._groups.pop(key)

    def _unwanted(self, job: Job) -> bool:
        return job.cancelled or time.monotonic() - job.submitted > self.limits.max_seconds

    def _end_unwanted(self, job: Job) -> None:
        seconds = self.limits.max_seconds
        self._close(job, Failed(TookTooLongError(f"the answer took more than {seconds:g} s")))

    def _admit(self) -> None:
        """Give free slots to the jobs that have waited longest, grouped by model."""
        free = self.limits.max_batch - sum(len(group.jobs) for group in self._groups.values())
        arriving: dict[tuple[int, str | None], list[Job]] = {}
        while self._waiting and free > 0:
            job = self._waiting.popleft()
            arriving.setdefault((id(job.model.weights), job.model.adapter), []).append(job)
            free -= 1
        for key, jobs in arriving.items():
            weights = jobs[0].model.weights
            if key[0] not in self._modes:
                mode = self._modes[key[0]] = contextlib.ExitStack()
                mode.enter_context(generation_mode(weights.model))
            group = self._groups.setdefault(key, _Group(weights, key[1]))
            with group.faults(self._close):
                group.admit(jobs, self._close)

    def _close(self, job: Job, event: Done | Failed) -> None:
        with self._lock:
            self._num_open -= 1
        if not job.cancelled:
            job.deliver(event)


Close = Callable[[Job, Done | Failed], None]


class _Group:
    """The jobs of one model and adapter, which share a batch."""

    def __init__(self, weights: Weights, adapter: str | None) -> None:
        self._weights, self._adapter = weights, adapter
        kind = RunningBatch if weights.takes_batches else OneByOne
        self._batch: RunningBatch | OneByOne = kind(weights.model)
        self.jobs: dict[int, Job] = {}
        self._rows: dict[int, Answer] = {}

    def admit(self, jobs: Sequence[Job], close: Close) -> None:
        rows = []
        for job in jobs:
            try:
                row = _answer(job)
            except Exception as error:
                close(job, Failed(_known(error)))
                continue
            self.jobs[id(row)], self._rows[id(job)] = job, row
            rows.append(row)
        if rows:
            with self._weights.with_adapter(self._adapter):
                self._deliver(self._batch.admit(rows), close)

    def step(self, close: Close) -> None:
        if self._batch.rows:
            with self._weights.with_adapter(self._adapter):
                self._deliver(self._batch.step(), close)

    def remove(self, job: Job) -> None:
        row = self._rows.pop(id(job))
        self.jobs.pop(id(row))
        self._batch.remove([row])

    def fail(self, error: Exception, close: Close) -> None:
        """End all jobs with `error`."""
        for job in self.jobs.values():
            close(job, Failed(error))
        self.jobs.clear()
        self._rows.clear()
        self._batch = type(self._batch)(self._weights.model)

    @contextlib.contextmanager
    def faults(self, close: Close) -> Iterator[None]:
        """Let an error end the jobs of this group only."""
        try:
            yield
        except Exception as error:
            self.fail(_known(error), close)

    def _deliver(self, found: Sequence[tuple[Answer, str]], close: Close) -> None:
        for row, text in found:
            job = self.jobs[id(row)]
            scores, row.scores = tuple(row.scores), []
            begins = row.num_generated == 1
            if (text or scores or begins) and not job.cancelled:
                job.deliver(Piece(text, scores))
            if row.finish:
                self.jobs.pop(id(row))
                self._rows.pop(id(job))
                close(job, Done(row.finish, row.num_prompt, row.num_generated))


def _known(error: Exception) -> Exception:
    """`error` as one that can be shown to the client; others are logged."""
    if is_out_of_memory(error):
        return LaunchError("there is not enough memory for these requests; send fewer")
    if not isinstance(error, XTunerError):
        logger.error("generation failed", exc_info=error)
    return error


def _answer(job: Job) -> Answer:
    """The answer to be generated for `job`.

    Raises:
        XTunerError: An image cannot be used, or the prompt leaves no room in the context.
    """
    served = job.model
    prompt, inputs = job.prompt, dict[str, Any]()
    if served.vision is not None and job.messages:
        images = ImageInput(served.vision)
        prompt = images.expanded(prompt, job.messages)
        inputs = images.inputs(prompt, job.messages)
    return begin(
        served.weights.model,
        served.tokenizer,
        served.template,
        prompt,
        job.options,
        inputs=inputs,
        top_logprobs=job.top_logprobs,
        keep=job.keep,
    )


def stream(engine: Engine, served: ServedModel) -> Callable[..., Generator[str, None, None]]:
    """A function with the arguments of `generation.generate.stream` that asks `engine`."""

    def generate(
        model: Any,
        tokenizer: Any,
        *,
        template: Template,
        messages: Sequence[Message],
        options: GenerationOptions,
        tools: Sequence[Mapping[str, Any]] = (),
        vision: ImageInput | None = None,
    ) -> Generator[str, None, None]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        asked = replace(served, template=template)
        images = messages if any(message.images for message in messages) else ()
        prompt = template.prompt_ids(messages, tools=tools)
        keep = call_markers(template) if tools else ()
        job = Job(asked, prompt, options, events.put, messages=images, keep=keep)
        engine.submit(job)
        try:
            while True:
                match events.get():
                    case Piece(text):
                        if text:
                            yield text
                    case Failed(error):
                        raise error
                    case Done():
                        return
        finally:
            engine.cancel(job)

    return generate


def facts(engine: Engine) -> Mapping[str, Any]:
    """The state of the engine, for /health."""
    return {"status": "ok", "open_requests": engine.num_open}
