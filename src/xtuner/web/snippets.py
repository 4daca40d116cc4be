"""Pieces of HTML that all tabs show; text is escaped."""

from __future__ import annotations

from html import escape

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of an event of the page: not part of the API, and no spinner over its outputs."""


def hint(text: str) -> str:
    """A line of small text."""
    return f'<p class="hint">{escape(text)}</p>'


def working(text: str) -> str:
    """A line of text above a bar that moves."""
    return f'{hint(text)}<div class="loading"><span></span></div>'


def fault(error: Exception) -> str:
    """An error."""
    return f'<pre class="fault">{escape(str(error))}</pre>'
