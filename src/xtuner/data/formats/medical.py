"""Medical questions and answers, in Chinese (shibing624/medical)."""

from xtuner.data.formats.base import Format, exchange, joined, optional_text, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the instruction, followed by the input on the next line."""
    question = joined(text(row, "instruction"), optional_text(row, "input"))
    return exchange(question, text(row, "output"))


FORMAT = Format(
    name="medical",
    description="Medical questions and answers. Same columns as alpaca; 'auto' selects that.",
    columns=("instruction", "output"),
    example={"instruction": "感冒了怎么办？", "input": "", "output": "多休息，多喝水。"},
    convert=convert,
    optional=("input",),
)
