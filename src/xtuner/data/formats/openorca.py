"""Questions with individual system prompts (Open-Orca/OpenOrca)."""

from xtuner.data.formats.base import Format, exchange, optional_text, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use question and response; the system prompt may be empty."""
    system = optional_text(row, "system_prompt")
    return exchange(text(row, "question"), text(row, "response"), system=system)


FORMAT = Format(
    name="openorca",
    description="A system prompt, a question and a response.",
    columns=("system_prompt", "question", "response"),
    example={
        "system_prompt": "Explain simply.",
        "question": "Why is snow white?",
        "response": "It scatters all light.",
    },
    convert=convert,
)
