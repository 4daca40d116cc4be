"""Programming tasks and solutions (nampdn-ai/tiny-codes)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the prompt as the question."""
    return exchange(text(row, "prompt"), text(row, "response"))


FORMAT = Format(
    name="tiny_codes",
    description="A prompt and a response.",
    columns=("prompt", "response"),
    example={"prompt": "Add 1 to x in C.", "response": "x++;"},
    convert=convert,
)
