"""Sample answers side by side, with the words marked that changed since the answer before."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from html import escape

from xtuner.i18n import Words
from xtuner.runs.folder import Evaluation

_MOST_COLUMNS = 6
_WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]|[^\W\u2e80-\u9fff]+|\s+|.", re.S)
_LONGEST = 4000
"""Longer answers are not compared word by word, which takes quadratic time."""


def table(evaluations: Sequence[Evaluation], words: Words) -> str:
    """A table with a row per question and a column per evaluation; empty without evaluations."""
    shown = _chosen(evaluations)
    if not shown:
        return ""
    head = "".join(f'<th scope="col">{_when(e, words)}</th>' for e in shown)
    questions = list(dict.fromkeys(str(a["question"]) for e in shown for a in e.answers))
    rows = "".join(_row(question, shown, words) for question in questions)
    note = ""
    if left_out := len(evaluations) - len(shown):
        note = f'<p class="note">{words("answers_left_out", count=left_out)}</p>'
    return (
        f'<div class="scroll"><table class="answers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _chosen(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The first, the last, and some evenly between them."""
    last = len(evaluations) - 1
    if last < _MOST_COLUMNS:
        return list(evaluations)
    indices = {round(i * last / (_MOST_COLUMNS - 1)) for i in range(_MOST_COLUMNS)}
    return [evaluations[i] for i in sorted(indices)]


def _when(evaluation: Evaluation, words: Words) -> str:
    if evaluation.when.startswith("before"):
        return words("answers_before")
    key = "answers_after" if evaluation.when.startswith("after training") else "answers_step"
    return words(key, step=evaluation.step)


def _row(question: str, shown: Sequence[Evaluation], words: Words) -> str:
    cells, before = [], None
    images: list[str] = []
    for evaluation in shown:
        found = next((a for a in evaluation.answers if a["question"] == question), None)
        if found is None:
            cells.append("<td></td>")
            continue
        images = [str(name) for name in found.get("images", ())]
        text = str(found["answer"])
        cells.append(_cell(text, before, words))
        before = text
    names = "".join(f'<div class="note">{escape(name)}</div>' for name in images)
    return f'<tr><th scope="row">{names}{escape(question)}</th>{"".join(cells)}</tr>'


def _cell(text: str, before: str | None, words: Words) -> str:
    if before == text:
        return f'<td class="same" title="{words("answers_same")}">{escape(text)}</td>'
    return f"<td>{escape(text) if before is None else marked(before, text)}</td>"


def marked(before: str, after: str) -> str:
    """`after` as HTML, with the words in ``<mark>`` that are not in `before`."""
    if max(len(before), len(after)) > _LONGEST:
        return escape(after)
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    pieces = []
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = escape("".join(new[start:stop]))
        pieces.append(text if kind == "equal" or not text.strip() else f"<mark>{text}</mark>")
    return "".join(pieces)
