"""Abstracts and titles of papers."""

from xtuner.data.formats.base import Format, question_and_answer

FORMAT = Format(
    name="arxiv",
    description="The abstract of a paper and its title.",
    columns=("abstract", "title"),
    example={"abstract": "We show that every tree has a leaf.", "title": "Leaves of trees"},
    convert=question_and_answer("abstract", "title"),
)
