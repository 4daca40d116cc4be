"""Instructions and answers (WizardLM)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the instruction as the question."""
    return exchange(text(row, "instruction"), text(row, "output"))


FORMAT = Format(
    name="wizardlm",
    description="An instruction and its answer.",
    columns=("instruction", "output"),
    example={"instruction": "Give a word for very small.", "output": "Tiny."},
    convert=convert,
    priority=2,
)
