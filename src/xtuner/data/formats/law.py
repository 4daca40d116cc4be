"""Legal questions with the relevant paragraphs, in Chinese (LawGPT_zh)."""

from xtuner.data.formats.base import Format, RowError, exchange, items, joined, kind, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Put the paragraphs, if any, before the question."""
    question = joined(*_references(row), text(row, "question"))
    return exchange(question, text(row, "answer"))


def _references(row: Row) -> list[str]:
    if row.get("reference") in (None, "", []):
        return []
    paragraphs = list(items(row, "reference"))
    for i, paragraph in enumerate(paragraphs):
        if not isinstance(paragraph, str):
            raise RowError(f"reference[{i}]", f"is {kind(paragraph)}", "it must be text")
    return paragraphs


FORMAT = Format(
    name="law",
    description="A list of paragraphs, a legal question, and the answer.",
    columns=("question", "reference", "answer"),
    example={
        "question": "几岁成年？",
        "reference": ["十八周岁以上的自然人为成年人。"],
        "answer": "十八周岁。",
    },
    convert=convert,
)
