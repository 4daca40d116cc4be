"""MMBench (arXiv:2307.06281): multiple-choice questions about images, from its TSV file.

    row ──question, options, image──► session ──answer──► letter ──► accuracy by category

A question may occur several times with its options rotated (indices that are equal modulo 10⁶). In
circular evaluation it counts as correct only if all its rotations are.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from xtuner.chat.session import Session
from xtuner.chat.xlsx import Cell, write_xlsx
from xtuner.errors import DataError

_LETTERS = "ABCDEFGH"
_SHIFTS = 10**6
_LONGEST_FIELD = 2**27
_SHORTEST_IMAGE = 64
"""A shorter field is the index of the row that has the image."""
_DIRECTLY = {
    True: "请直接回答选项字母。",
    False: "Answer with the option's letter from the given choices directly.",
}


@dataclass(frozen=True)
class Question:
    """One row: the question, its options by letter, and the correct letter (empty if unknown)."""

    index: int
    text: str
    hint: str
    options: dict[str, str]
    answer: str
    category: str
    ability: str
    image: str

    @property
    def prompt(self) -> str:
        """The question as the model sees it."""
        chinese = bool(re.search(r"[\u4e00-\u9fff]", self.text))
        lines = [self.hint, self.text, *(f"{key}. {text}" for key, text in self.options.items())]
        return "\n".join([*filter(None, lines), _DIRECTLY[chinese]])


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer and the letter in it."""

    question: Question
    answer: str
    letter: str

    @property
    def right(self) -> bool:
        """Whether the letter is correct."""
        return self.letter == self.question.answer


def read_tsv(file: Path) -> list[Question]:
    """The questions of a TSV file of MMBench.

    Raises:
        DataError: It cannot be read, or lacks a column.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as TSV: {error}") from error
    lacking = {"index", "question", "image", "A"} - set(rows[0] if rows else ())
    if lacking:
        raise DataError(f"{file}: is not an MMBench file; it lacks {', '.join(sorted(lacking))}")
    images = {row["index"]: row["image"] for row in rows}
    return [_question(row, images, file) for row in rows]


def _question(row: dict[str, str], images: dict[str, str], file: Path) -> Question:
    image = row["image"] or ""
    if len(image) < _SHORTEST_IMAGE:
        image = images.get(image, "")
    try:
        index = int(float(row["index"]))
    except ValueError:
        raise DataError(f"{file}: index {row['index']!r} is not a number") from None
    given = {letter: row.get(letter) or "" for letter in _LETTERS}
    return Question(
        index=index,
        text=row["question"],
        hint=_known(row.get("hint")),
        options={letter: text for letter, text in given.items() if _known(text)},
        answer=_known(row.get("answer")),
        category=_known(row.get("category")),
        ability=_known(row.get("l2-category") or row.get("l2_category")),
        image=image,
    )


def _known(text: str | None) -> str:
    """`text`; empty for pandas' missing value."""
    return "" if text is None or text.strip().lower() == "nan" else text.strip()


def ask_all(
    session: Session, questions: Sequence[Question], *, progress: Callable[[int], None]
) -> Iterator[Answered]:
    """Ask every question in a conversation of its own.

    Args:
        session: A session with a model that takes images.
        questions: The result of `read_tsv`.
        progress: Called with the number of answers so far.

    Raises:
        DataError: An image cannot be decoded.
    """
    with TemporaryDirectory(prefix="xtuner-") as folder:
        file = Path(folder) / "image"
        for number, question in enumerate(questions, 1):
            try:
                file.write_bytes(base64.b64decode(question.image, validate=True))
            except (binascii.Error, ValueError) as error:
                raise DataError(f"index {question.index}: its image is not base64") from error
            session.reset()
            answer = "".join(session.ask(question.prompt, [str(file)])).strip()
            yield Answered(question, answer, letter_of(answer, question.options))
            progress(number)


def letter_of(answer: str, options: dict[str, str]) -> str:
    """The option that `answer` chooses; empty if none or several."""
    if match := re.match(r"\W*([A-H])(?![A-Za-z])", answer):
        return match[1] if match[1] in options else ""
    alone = set(re.findall(r"(?<![A-Za-z])([A-H])(?![A-Za-z'])", answer)) & set(options)
    if len(alone) == 1:
        return str(alone.pop())
    named = [key for key, text in options.items() if text and text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


def accuracy(answered: Sequence[Answered]) -> dict[str, float]:
    """Share of correct answers: overall, circular, and by ability and category (circular).

    Empty if no answer is known, as in the test split.
    """
    known = [each for each in answered if each.question.answer]
    if not known:
        return {}
    groups: dict[int, list[Answered]] = defaultdict(list)
    for each in known:
        groups[each.question.index % _SHIFTS].append(each)
    circular = [(group[0].question, all(each.right for each in group)) for group in groups.values()]
    found = {
        "each question": sum(each.right for each in known) / len(known),
        "circular": sum(right for _, right in circular) / len(circular),
    }
    for kind in ("ability", "category"):
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for question, right in circular:
            by_kind[getattr(question, kind)].append(right)
        found |= {
            f"{kind}: {name}": sum(rights) / len(rights)
            for name, rights in sorted(by_kind.items())
            if name
        }
    return found


def write(folder: Path, answered: Sequence[Answered]) -> dict[str, float]:
    """Write ``mmbench_result.xlsx`` and ``.json`` to `folder`; return the accuracies."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for each in answered for letter in each.question.options})
    head = ["index", "question", *letters, "prediction", "answer", "right", "category",
            "l2-category", "full answer"]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            q.index, q.text, *(q.options.get(letter, "") for letter in letters), each.letter,
            q.answer, int(each.right) if q.answer else "", q.category, q.ability, each.answer,
        ]
        for each in answered
        for q in [each.question]
    ]  # fmt: skip
    found = accuracy(answered)
    sheets: dict[str, list[list[Cell]]] = {"predictions": [[*head], *rows]}
    shares: list[list[Cell]] = [[name, value] for name, value in found.items()]
    sheets["accuracy"] = [["of", "share"], *shares]
    write_xlsx(folder / "mmbench_result.xlsx", sheets)
    content = {
        "accuracy": found,
        "predictions": [
            {**asdict(each.question), "image": "", "letter": each.letter, "full": each.answer}
            for each in answered
        ],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (folder / "mmbench_result.json").write_text(text, encoding="utf-8")
    return found
