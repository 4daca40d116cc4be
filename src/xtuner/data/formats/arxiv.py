"""Abstracts and titles of papers."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Ask for the title of the abstract."""
    return exchange(text(row, "abstract"), text(row, "title"))


FORMAT = Format(
    name="arxiv",
    description="From the abstract of a paper to its title.",
    columns=("abstract", "title"),
    example={"abstract": "We show that every tree has a leaf.", "title": "Leaves of trees"},
    convert=convert,
)
