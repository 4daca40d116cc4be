"""Colors and their descriptions (burkelibbey/colors)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="colorist",
    description="The description of a color and the color.",
    columns=("description", "color"),
    example={"description": "Pure red, as bright as can be.", "color": "#ff0000"},
    convert=question_and_answer("description", "color"),
)
