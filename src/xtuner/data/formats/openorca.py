"""Questions with individual system prompts (Open-Orca/OpenOrca)."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="openorca",
    description="A system prompt, a question and a response.",
    columns=("system_prompt", "question", "response"),
    example={
        "system_prompt": "Explain simply.",
        "question": "Why is snow white?",
        "response": "It scatters all light.",
    },
    convert=question_and_answer("question", "response", system="system_prompt"),
)
