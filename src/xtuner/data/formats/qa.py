"""A question and its answer."""

from xtuner.data.formats.base import Format, exchange, optional_text, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use question and answer; other columns are ignored."""
    system = optional_text(row, "system")
    return exchange(text(row, "question"), text(row, "answer"), system=system)


FORMAT = Format(
    name="qa",
    description="A question and its answer; also a system prompt, if there is one.",
    columns=("question", "answer"),
    example={"question": "What is the capital of France?", "answer": "Paris."},
    convert=convert,
    optional=("system",),
)
