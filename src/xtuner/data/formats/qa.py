"""A question and its answer."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use question and answer; other columns are ignored."""
    return exchange(text(row, "question"), text(row, "answer"))


FORMAT = Format(
    name="qa",
    description="A question and its answer; other columns are ignored.",
    columns=("question", "answer"),
    example={"question": "What is the capital of France?", "answer": "Paris."},
    convert=convert,
)
