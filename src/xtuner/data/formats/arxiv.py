"""Abstracts and titles of papers."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the abstract as the question and the title as the answer."""
    return exchange(text(row, "abstract"), text(row, "title"))


FORMAT = Format(
    name="arxiv",
    description="The abstract of a paper and its title.",
    columns=("abstract", "title"),
    example={"abstract": "We show that every tree has a leaf.", "title": "Leaves of trees"},
    convert=convert,
)
