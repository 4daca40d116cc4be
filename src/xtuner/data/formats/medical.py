"""Medical questions and answers, in Chinese (shibing624/medical)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="medical",
    description="Medical questions and answers. Same columns as alpaca; 'auto' selects that.",
    columns=("instruction", "output"),
    example={"instruction": "感冒了怎么办？", "input": "", "output": "多休息，多喝水。"},
    convert=question_and_answer("instruction", "output", context="input"),
    optional=("input",),
)
