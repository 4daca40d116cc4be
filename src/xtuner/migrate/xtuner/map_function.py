"""The dataset_format for a ``dataset_map_fn`` of XTuner 0.x."""

from __future__ import annotations

from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Dotted
from xtuner.migrate.xtuner.names import names
from xtuner.migrate.xtuner.systems import message


def format_of(value: Any, line: int, draft: Draft) -> tuple[str, str]:
    """The dataset_format and the system message for a ``dataset_map_fn``."""
    if value is None:
        return "xtuner", ""
    if not isinstance(value, str | Dotted):
        draft.refuse(line, shown("dataset_map_fn", value), "is not the name of a function")
        return "auto", ""
    name = str(value).rpartition(".")[2]
    row = names("map_fns").get(name)
    if row is None:
        draft.refuse(
            line,
            f"dataset_map_fn = {value}",
            "is a custom function: port it as dataset_format = 'my_format.py:to_messages' (see "
            "docs/formats.md), and put a known dataset_map_fn into this config to migrate it",
        )
        return "auto", ""
    if "refuse" in row:
        draft.refuse(line, f"dataset_map_fn = {name}", row["refuse"])
        return "auto", ""
    return row["format"], message(row.get("system", ""), line, draft)
