"""The Chinese columns of a translated Alpaca."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="alpaca_zh",
    description="Alpaca in Chinese; English columns are ignored.",
    columns=("instruction_zh", "output_zh"),
    example={"instruction_zh": "翻译成英文。", "input_zh": "你好", "output_zh": "Hello"},
    convert=question_and_answer("instruction_zh", "output_zh", context="input_zh"),
    optional=("input_zh",),
    priority=4,
)
