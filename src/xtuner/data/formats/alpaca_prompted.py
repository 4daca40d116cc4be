"""Like `alpaca`, with the instruction in the prompt of Stanford Alpaca."""

from xtuner.data.formats.base import Format, exchange, optional_text, text
from xtuner.types import Conversation, Row

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


def convert(row: Row) -> Conversation:
    """Put instruction and input under their headings, followed by the response heading."""
    instruction, given = text(row, "instruction"), optional_text(row, "input")
    opening = f"{_TASK}, paired with an input that provides further context. " if given else ""
    opening = f"{opening or f'{_TASK}. '}{_REQUEST}"
    parts = [opening, f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{given}"] if given else []
    return exchange("\n\n".join([*parts, "### Response:\n"]), text(row, "output"))


FORMAT = Format(
    name="alpaca_prompted",
    description="Like alpaca, in the prompt of Stanford Alpaca.",
    columns=("instruction", "output"),
    example={"instruction": "Name the colour.", "input": "a ripe lemon", "output": "Yellow."},
    convert=convert,
    optional=("input",),
    priority=-1,
)
