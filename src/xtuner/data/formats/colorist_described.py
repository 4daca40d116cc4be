"""Colours and their descriptions without the name before the colon (burkelibbey/colors)."""

from xtuner.data.formats.base import Format, RowError, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Ask for the colour of what stands behind the first colon of the description."""
    described = text(row, "description").partition(":")[2].strip()
    if not described:
        raise RowError("description", "has nothing behind a colon", "fill it in or remove the row")
    return exchange(described, text(row, "color"))


FORMAT = Format(
    name="colorist_described",
    description="As colorist, without the colour's name that stands before the colon.",
    columns=("description", "color"),
    example={"description": "Pure red: as bright as can be.", "color": "#ff0000"},
    convert=convert,
    priority=-1,
)
