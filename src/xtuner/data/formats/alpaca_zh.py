"""The Chinese columns of a translated Alpaca."""

from xtuner.data.formats.base import Format, exchange, joined, optional_text, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the instruction, followed by the input on the next line."""
    question = joined(text(row, "instruction_zh"), optional_text(row, "input_zh"))
    return exchange(question, text(row, "output_zh"))


FORMAT = Format(
    name="alpaca_zh",
    description="Alpaca in Chinese; English columns are ignored.",
    columns=("instruction_zh", "output_zh"),
    example={"instruction_zh": "翻译成英文。", "input_zh": "你好", "output_zh": "Hello"},
    convert=convert,
    optional=("input_zh",),
    priority=4,
)
