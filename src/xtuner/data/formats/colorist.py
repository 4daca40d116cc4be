"""Colours and their descriptions (burkelibbey/colors)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Ask for the colour of the description."""
    return exchange(text(row, "description"), text(row, "color"))


FORMAT = Format(
    name="colorist",
    description="From the description of a colour to the colour.",
    columns=("description", "color"),
    example={"description": "Pure red, as bright as can be.", "color": "#ff0000"},
    convert=convert,
)
