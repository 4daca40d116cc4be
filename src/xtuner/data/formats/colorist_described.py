"""Colors and their descriptions without the color name (burkelibbey/colors)."""

from xtuner.data.formats.base import Format, RowError, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the description after the first colon as the question."""
    described = text(row, "description").partition(":")[2].strip()
    if not described:
        raise RowError("description", "has no text after a colon", "fill it in or remove the row")
    return exchange(described, text(row, "color"))


FORMAT = Format(
    name="colorist_described",
    description="Like colorist, without the color name before the colon.",
    columns=("description", "color"),
    example={"description": "Pure red: as bright as can be.", "color": "#ff0000"},
    convert=convert,
    priority=-1,
)
