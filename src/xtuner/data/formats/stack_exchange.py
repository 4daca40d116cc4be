"""Questions and answers of a forum (ArmelR/stack-exchange-instruction)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="stack_exchange",
    description="A question and a response.",
    columns=("question", "response"),
    example={"question": "How do I list hidden files?", "response": "Use ls -a."},
    convert=question_and_answer("question", "response"),
)
