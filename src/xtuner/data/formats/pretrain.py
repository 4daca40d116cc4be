"""Plain text for continued pretraining."""

from xtuner.data.formats.base import Format, text
from xtuner.types import Row, Text


def convert(row: Row) -> Text:
    """Use the text unchanged."""
    return Text(text(row, "text"))


FORMAT = Format(
    name="pretrain",
    description="Plain text; every token is supervised.",
    columns=("text",),
    example={"text": "The Moon is the Earth's only natural satellite."},
    convert=convert,
    priority=-20,
)
