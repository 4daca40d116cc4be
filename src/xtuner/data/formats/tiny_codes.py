"""Programming tasks and solutions (nampdn-ai/tiny-codes)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="tiny_codes",
    description="A prompt and a response.",
    columns=("prompt", "response"),
    example={"prompt": "Add 1 to x in C.", "response": "x++;"},
    convert=question_and_answer("prompt", "response"),
)
