"""Questions and answers of a forum (ArmelR/stack-exchange-instruction)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use question and response."""
    return exchange(text(row, "question"), text(row, "response"))


FORMAT = Format(
    name="stack_exchange",
    description="A question and a response.",
    columns=("question", "response"),
    example={"question": "How do I list hidden files?", "response": "Use ls -a."},
    convert=convert,
)
