"""Fetch models once (written by the chat/convert engineer; `cached` is what load.py needs)."""

from __future__ import annotations

from pathlib import Path


def cached(name: str) -> Path | None:
    """The folder of a model that `fetch` brought, by its catalog name or hub name; None if it was not fetched."""
    return None
