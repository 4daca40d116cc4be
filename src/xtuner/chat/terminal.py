"""A conversation over lines of text: a terminal, or a pipe.

An empty line ends a question, so that a question may have several lines. A line EXIT leaves, a line
RESET forgets the conversation, a line IMAGE PATH shows an image with the next question. Answers
go to `out`, everything else to `notes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TextIO

from xtuner.chat.session import Session
from xtuner.errors import DataError

EXIT, RESET, IMAGE = "EXIT", "RESET", "IMAGE "


@dataclass(frozen=True)
class Terminal:
    """Where questions come from and answers go.

    Attributes:
        read_line: returns the next line without its end; raises EOFError behind the last one.
        out: gets the answers, each with a line end.
        notes: gets prompts and notes.
        interactive: a person is there: show prompts.
        streaming: show an answer while it grows.
        images: images shown with the first question of every conversation.
        waiting: images to show with the next question.
    """

    read_line: Callable[[str], str]
    out: TextIO
    notes: TextIO
    interactive: bool = False
    streaming: bool = True
    images: tuple[str, ...] = ()
    waiting: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting.extend(self.images)

    @classmethod
    def standard(cls, *, streaming: bool = True, images: tuple[str, ...] = ()) -> Terminal:
        """The terminal or the pipe that this process was started with."""
        interactive = sys.stdin.isatty()
        if interactive:
            import contextlib

            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() a history and editing keys
        read = input if interactive else _read_from_pipe
        return cls(read, sys.stdout, sys.stderr, interactive, streaming, images)

    def answer(self, session: Session, question: str) -> None:
        """Ask and show the answer; Ctrl-C stops it and passes on."""
        shown, self.waiting[:] = tuple(self.waiting), ()
        pieces = session.ask(question, shown) if shown else session.ask(question)
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
                self._reset(session)
            elif question.startswith(IMAGE):
                self.waiting.append(question.removeprefix(IMAGE).strip())
            else:
                self.answer(session, question)

    def converse(self, session: Session) -> None:
        """Ask what comes in until EXIT or the end of the input."""
        self._note("An empty line sends; EXIT leaves, RESET forgets, Ctrl-C stops an answer.\n")
        while (question := self._question()) is not None:
            if question == RESET:
                self._reset(session)
                self._note("(forgotten)\n")
                continue
            if question.startswith(IMAGE):
                self._show_next(session, question.removeprefix(IMAGE).strip())
                continue
            waiting = list(self.waiting)
            try:
                self.answer(session, question)
            except KeyboardInterrupt:
                self._note("(stopped)")
            except DataError as error:  # of this question alone
                self.waiting[:] = waiting
                print(f"({error})", file=self.notes, flush=True)
            self._note("")

    def _reset(self, session: Session) -> None:
        session.reset()
        self.waiting[:] = self.images

    def _show_next(self, session: Session, name: str) -> None:
        """Keep an image for the next question if it can be shown."""
        try:
            if session.vision is None:
                raise DataError("this model has no eyes: images need a LLaVA model")
            session.vision.check([name])
        except DataError as error:
            print(f"({error})", file=self.notes, flush=True)
            return
        self.waiting.append(name)
        self._note(f"(image {len(self.waiting)} for the next question)\n")

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
            if not lines and line.startswith(IMAGE):
                return line
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
