"""A question and its answer."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="qa",
    description="A question and its answer; also a system prompt, if there is one.",
    columns=("question", "answer"),
    example={"question": "What is the capital of France?", "answer": "Paris."},
    convert=question_and_answer("question", "answer", system="system"),
    optional=("system",),
)
