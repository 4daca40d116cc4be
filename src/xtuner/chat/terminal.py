"""Chat in a terminal or over a pipe.

A blank line ends a question, so questions may span lines. A line EXIT quits, a line RESET starts a
new conversation, a line IMAGE PATH attaches an image to the next question. Answers go to `out`,
everything else to `notes`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TextIO

from xtuner.calls.families.python_text import python_call
from xtuner.calls.read import arguments_of, name_of
from xtuner.chat.session import Session
from xtuner.data.report.show_tokens import visible
from xtuner.errors import DataError, count
from xtuner.tools import loop
from xtuner.wrapping import wrapped

EXIT, RESET, IMAGE = "EXIT", "RESET", "IMAGE "


@dataclass(frozen=True)
class Terminal:
    """Where questions come from and answers go.

    Attributes:
        read_line: Returns the next line without its line end; raises EOFError at the end.
        out: Receives the answers, each followed by a line end.
        notes: Receives prompts and notes.
        interactive: Show prompts and notes.
        streaming: Print an answer while it is generated.
        images: Images attached to the first question of every conversation.
        pending: Images attached to the next question.
        trusted: Tools that run without asking.
        waiting: Shows that something is done in its block, where nothing is printed.
    """

    read_line: Callable[[str], str]
    out: TextIO
    notes: TextIO
    interactive: bool = False
    streaming: bool = True
    images: tuple[str, ...] = ()
    pending: list[str] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        self.pending.extend(self.images)

    @classmethod
    def standard(
        cls,
        *,
        streaming: bool = True,
        images: tuple[str, ...] = (),
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Terminal:
        """The terminal or pipe of this process."""
        interactive = sys.stdin.isatty()
        if interactive:
            import contextlib

            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  adds history and editing keys to input()
        read = input if interactive else _read_from_pipe
        return cls(read, sys.stdout, sys.stderr, interactive, streaming, images, waiting=waiting)

    def answer(self, session: Session, question: str) -> None:
        """Ask and print the answer; KeyboardInterrupt stops it and is re-raised."""
        images, self.pending[:] = tuple(self.pending), ()
        if session.tools is not None:
            self._act(session, question, images)
            return
        pieces = session.ask(question, images) if images else session.ask(question)
        try:
            with self.waiting():
                text = next(pieces, "") if self.streaming else "".join(pieces)
            self._write(text)
            for piece in pieces:
                self._write(piece)
        finally:
            pieces.close()
            self.out.write("\n")
            self.out.flush()

    def _write(self, text: str) -> None:
        """Print text of the model; in a terminal, which would execute control characters, without
        them."""
        self.out.write(visible(text) if self.out.isatty() else text)
        self.out.flush()

    def _act(self, session: Session, question: str, images: tuple[str, ...]) -> None:
        """Answer with tools: text goes to `out`, calls and results to `notes`."""
        steps = session.act(question, images)
        line_open = False
        try:
            while True:
                # in a terminal, a call may ask whether it may run
                quiet = nullcontext if self.interactive or line_open else self.waiting
                with quiet():
                    event = next(steps, None)
                if event is None:
                    break
                if isinstance(event, loop.Text):
                    self._write(event.text)
                    line_open = not event.text.endswith("\n")
                    continue
                if line_open:
                    self.out.write("\n")
                    self.out.flush()
                    line_open = False
                # `allow` has shown the call
                if not isinstance(event, loop.Called):
                    print(_as_text(event), file=self.notes, flush=True)
        finally:
            steps.close()
            if line_open:
                self.out.write("\n")
                self.out.flush()

    def allow(self, call: Mapping[str, Any], *, always: bool) -> bool:
        """Show a call; ask whether it may run unless `always`."""
        print(f"→ {shown_call(call)}", file=self.notes, flush=True)
        if always or name_of(call) in self.trusted:
            return True
        while True:
            try:
                reply = (
                    self.read_line("  run it? [y]es, [n]o, [a]lways this tool: ").strip().lower()
                )
            except EOFError:
                return False
            if reply in ("a", "always"):
                self.trusted.add(name_of(call))
            if reply in ("", "y", "yes", "a", "always"):
                return True
            if reply in ("n", "no"):
                return False

    def ask_all(self, session: Session, questions: Iterable[str]) -> None:
        """Ask `questions` in one conversation; RESET starts a new one."""
        for question in questions:
            if question.strip() == RESET:
                self._reset(session)
            elif question.startswith(IMAGE):
                self.pending.append(question.removeprefix(IMAGE).strip())
            else:
                self.answer(session, question)

    def converse(self, session: Session) -> None:
        """Read and answer questions until EXIT or the end of the input."""
        self._note(
            "A blank line sends the question. EXIT quits, RESET starts a new conversation, "
            "Ctrl-C stops an answer.\n"
        )
        while (question := self._question()) is not None:
            if question == RESET:
                self._reset(session)
                self._note("(new conversation)\n")
                continue
            if question.startswith(IMAGE):
                self._attach(session, question.removeprefix(IMAGE).strip())
                continue
            pending = list(self.pending)
            try:
                self.answer(session, question)
            except KeyboardInterrupt:
                self._note("(stopped)")
            except DataError as error:  # affects only this question
                self.pending[:] = pending
                print(f"({error})", file=self.notes, flush=True)
            self._note("")

    def _reset(self, session: Session) -> None:
        session.reset()
        self.pending[:] = self.images

    def _attach(self, session: Session, name: str) -> None:
        """Attach an image to the next question if it can be read."""
        try:
            if session.vision is None:
                raise DataError("this model does not take images; use a LLaVA model")
            session.vision.check([name])
        except DataError as error:
            print(f"({error})", file=self.notes, flush=True)
            return
        self.pending.append(name)
        self._note(f"(image {len(self.pending)} attached to the next question)\n")

    def _question(self) -> str | None:
        """The next question, RESET, an image line, or None to quit."""
        lines: list[str] = []
        while True:
            try:
                line = self.read_line(("... " if lines else ">>> ") if self.interactive else "")
            except KeyboardInterrupt:
                self._note("")
                return None
            except EOFError:
                return "\n".join(lines) if lines else None
            if not lines and line.strip() == EXIT:
                return None
            if not lines and line.strip() == RESET:
                return RESET
            if not lines and line.startswith(IMAGE):
                return line
            if line.strip():
                lines.append(line)
            elif lines:
                return "\n".join(lines)

    def _note(self, text: str) -> None:
        if self.interactive:
            width = shutil.get_terminal_size().columns
            print(wrapped(text, width, indent=0), file=self.notes, flush=True)


def shown_call(call: Mapping[str, Any]) -> str:
    """A call on one line, as Python would write it."""
    if isinstance(arguments_of(call), Mapping):
        return _printable(python_call(call))
    return _printable(f"{name_of(call)}({arguments_of(call)!r})")


def _as_text(event: loop.Event) -> str:
    match event:
        case loop.Returned(result=result):
            return "← " + "\n  ".join(_printable(result.text).splitlines() or [""])
        case loop.Malformed(text=text, problem=problem):
            return f"! a call {problem}: {_printable(text)[:200]}"
        case loop.Stopped(rounds=rounds):
            return f"(stopped after {count(rounds, 'round')} of calls; --max-rounds raises this)"
    return ""


def _printable(text: str) -> str:
    """`text` without control characters, which a terminal would execute."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)


def _read_from_pipe(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
