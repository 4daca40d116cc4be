"""Programming tasks and solutions (HuggingFaceH4/CodeAlpaca_20K)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the prompt as the question."""
    return exchange(text(row, "prompt"), text(row, "completion"))


FORMAT = Format(
    name="code_alpaca",
    description="A prompt and its completion.",
    columns=("prompt", "completion"),
    example={"prompt": "Print hi in Python.", "completion": 'print("hi")'},
    convert=convert,
)
