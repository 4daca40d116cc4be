"""Colors and their descriptions (burkelibbey/colors)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Use the description as the question and the color as the answer."""
    return exchange(text(row, "description"), text(row, "color"))


FORMAT = Format(
    name="colorist",
    description="The description of a color and the color.",
    columns=("description", "color"),
    example={"description": "Pure red, as bright as can be.", "color": "#ff0000"},
    convert=convert,
)
