"""One input and one output."""

from xtuner.data.formats.base import Format, exchange, optional_text, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the input as the question."""
    return exchange(text(row, "input"), text(row, "output"), system=optional_text(row, "system"))


FORMAT = Format(
    name="io",
    description="One input and one output, with an optional system prompt.",
    columns=("input", "output"),
    example={"input": "2 + 3 =", "output": "5"},
    convert=convert,
    optional=("system",),
)
