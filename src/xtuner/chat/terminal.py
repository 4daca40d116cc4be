"""A conversation over lines of text: a terminal, or a pipe.

An empty line ends a question, so that a question may have several lines. A line EXIT leaves, a line
RESET forgets the conversation. Answers go to `out`, everything else to `notes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TextIO

from xtuner.chat.session import Session

EXIT, RESET = "EXIT", "RESET"


@dataclass(frozen=True)
class Terminal:
    """Where questions come from and answers go.

    Attributes:
        read_line: returns the next line without its end; raises EOFError behind the last one.
        out: gets the answers, each with a line end.
        notes: gets prompts and notes.
        interactive: a person is there: show prompts.
        streaming: show an answer while it grows.
    """

    read_line: Callable[[str], str]
    out: TextIO
    notes: TextIO
    interactive: bool = False
    streaming: bool = True

    @classmethod
    def standard(cls, *, streaming: bool = True) -> Terminal:
        """The terminal or the pipe that this process was started with."""
        interactive = sys.stdin.isatty()
        if interactive:
            import contextlib

            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() a history and editing keys
        read = input if interactive else _read_from_pipe
        return cls(read, sys.stdout, sys.stderr, interactive, streaming)

    def answer(self, session: Session, question: str) -> None:
        """Ask and show the answer; Ctrl-C stops it and passes on."""
        pieces = session.ask(question)
        try:
            if self.streaming:
                for piece in pieces:
                    self.out.write(piece)
                    self.out.flush()
            else:
                self.out.write("".join(pieces))
        finally:
            pieces.close()
            self.out.write("\n")
            self.out.flush()

    def ask_all(self, session: Session, questions: Iterable[str]) -> None:
        """Ask one question after the other in one conversation, which RESET begins anew."""
        for question in questions:
            if question.strip() == RESET:
                session.reset()
            else:
                self.answer(session, question)

    def converse(self, session: Session) -> None:
        """Ask what comes in until EXIT or the end of the input."""
        self._note("An empty line sends; EXIT leaves, RESET forgets, Ctrl-C stops an answer.\n")
        while (question := self._question()) is not None:
            if question == RESET:
                session.reset()
                self._note("(forgotten)\n")
                continue
            try:
                self.answer(session, question)
            except KeyboardInterrupt:
                self._note("(stopped)")
            self._note("")

    def _question(self) -> str | None:
        """The next question, RESET, or None to leave."""
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
            if line.strip():
                lines.append(line)
            elif lines:
                return "\n".join(lines)

    def _note(self, text: str) -> None:
        if self.interactive:
            print(text, file=self.notes, flush=True)


def _read_from_pipe(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
