"""Instructions and answers (WizardLM)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="wizardlm",
    description="An instruction and its answer.",
    columns=("instruction", "output"),
    example={"instruction": "Give a word for very small.", "output": "Tiny."},
    convert=question_and_answer("instruction", "output"),
    priority=2,
)
