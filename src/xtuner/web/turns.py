"""Answers in progress: the user of a browser tab stops them, and allows the calls of tools.

answering thread ──allow──► waits ◄──reply── button
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xtuner.calls.read import name_of

Reply = Literal["yes", "no", "always"]
"""To the question whether a call may run; 'always' allows all further calls of the tool."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Request:
    """A call that waits to be allowed.

    Attributes:
        number: The number by which a reply refers to it.
        call: What would run.
    """

    number: int
    call: Mapping[str, Any]
    _reply: queue.SimpleQueue[Reply] = field(default_factory=queue.SimpleQueue, repr=False)


class Turn:
    """The answers to one question in a browser tab.

    Args:
        always: Run calls without asking.
        trusted: Tools that run without asking; 'always' adds to it.

    Attributes:
        stopped: Ends the answers when set.
    """

    def __init__(self, *, always: bool = False, trusted: set[str] | None = None) -> None:
        self._always = always
        self._trusted = set() if trusted is None else trusted
        self.stopped = threading.Event()
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}

    def allow(self, call: Mapping[str, Any], ask: Callable[[Request], None]) -> bool:
        """Whether `call` may run; waits for the reply, or until the turn is stopped.

        Args:
            call: Of a tool.
            ask: Shows the request to the user.
        """
        if self._always or name_of(call) in self._trusted:
            return True
        request = Request(next(self._numbers), call)
        self._requests[request.number] = request
        ask(request)
        try:
            reply = self._wait(request)
        finally:
            del self._requests[request.number]
        if reply == "always":
            self._trusted.add(name_of(call))
        return reply != "no"

    def _wait(self, request: Request) -> Reply:
        while not self.stopped.is_set():
            try:
                return request._reply.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return "no"

    def reply(self, number: int, reply: Reply) -> None:
        """Answer request `number`; one that no longer waits is ignored."""
        if request := self._requests.get(number):
            request._reply.put(reply)


class Turns:
    """The turn in progress of each browser tab.

    Args:
        always: Run calls without asking.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        self._turns: dict[str, Turn] = {}
        self._trusted: dict[str, set[str]] = {}

    def begin(self, tab: str) -> Turn:
        """A new turn; the one in progress is stopped."""
        self.stop(tab)
        trusted = self._trusted.setdefault(tab, set())
        turn = self._turns[tab] = Turn(always=self._always, trusted=trusted)
        return turn

    def stop(self, tab: str) -> None:
        """Stop what is being answered in `tab`."""
        if turn := self._turns.pop(tab, None):
            turn.stopped.set()

    def reply(self, tab: str, number: int, reply: Reply) -> None:
        """Answer request `number` of the turn in progress; see `Turn.reply`."""
        if turn := self._turns.get(tab):
            turn.reply(number, reply)

    def forget(self, tab: str) -> None:
        """Stop the turn of a tab that was closed, and forget which tools it allowed."""
        self.stop(tab)
        self._trusted.pop(tab, None)
