"""Questions about tables, answered with SQL (b-mc2/sql-create-context)."""

from xtuner.data.formats.base import Format, exchange, text
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Put the tables before the question."""
    question = f"{text(row, 'context')}\n\n{text(row, 'question')}"
    return exchange(question, text(row, "answer"))


FORMAT = Format(
    name="sql",
    description="Tables (as CREATE statements), a question, and the query.",
    columns=("question", "context", "answer"),
    example={
        "question": "How many users are there?",
        "context": "CREATE TABLE users (id INT)",
        "answer": "SELECT COUNT(*) FROM users",
    },
    convert=convert,
)
