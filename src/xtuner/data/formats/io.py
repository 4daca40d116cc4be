"""One input and one output."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="io",
    description="One input and one output, with an optional system prompt.",
    columns=("input", "output"),
    example={"input": "2 + 3 =", "output": "5"},
    convert=question_and_answer("input", "output", system="system"),
    optional=("system",),
)
