"""What happened to every row of the data, from the data report of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from xtuner.i18n import Words

_COLUMNS = ("source", "format", "read", "used", "left_out", "lost", "changed")


def parts(data: Mapping[str, Any], words: Words, *, details: bool = True) -> Iterator[str]:
    """Pieces of HTML.

    Args:
        data: `DataReport.as_dict()`, or the file that a run writes.
        words: Strings.
        details: Also list which rows were lost or changed.
    """
    head = "".join(
        f"<th{' class=number' if i > 1 else ''}>{words('data_' + column)}</th>"
        for i, column in enumerate(_COLUMNS)
    )
    rows = "".join(_source_row(source) for source in data["sources"])
    table = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    yield f'<div class="scroll"><table>{table}</table></div>'
    for source in data["sources"] if details else ():
        kept = [
            {**group, "what": words("data_kept", what=group["what"])}
            for group in source.get("kept", ())
        ]
        yield from _groups([*source["lost"], *kept, *source["changed"]], words)
    yield from (f'<p class="note">{escape(note)}</p>' for note in data.get("notes", ()))
    yield f"<p>{_training(data, words)}</p>"
    if data.get("validation"):
        yield f"<p>{words('data_validation', **_counts(data['validation']))}</p>"


def _training(data: Mapping[str, Any], words: Words) -> str:
    part = data["train"]
    if not data.get("packed", True):
        return words("data_training_unpacked", **_counts(part))
    fill = f"{part['fill']:.0%}"
    return words("data_training", **_counts(part), packs=part["packs"], fill=fill)


def _source_row(source: Mapping[str, Any]) -> str:
    formats = ", ".join(source["formats"])
    numbers = (
        source["rows_read"],
        source["rows_used"],
        source["rows_left_out"],
        sum(group["count"] for group in source["lost"]),
        sum(group["count"] for group in source["changed"]),
    )
    cells = "".join(f'<td class="number">{number:,}</td>' for number in numbers)
    return f"<tr><td>{escape(source['name'])}</td><td>{escape(formats)}</td>{cells}</tr>"


def _groups(groups: Sequence[Mapping[str, Any]], words: Words) -> Iterator[str]:
    """Rows that were lost or changed for one reason, folded."""
    for group in groups:
        title = words("data_rows", count=f"{group['count']:,}", what=group["what"])
        lines = [_row(row) for row in group["first"]]
        if more := group["count"] - len(lines):
            lines.append(words("data_more", count=f"{more:,}"))
        yield f"<details><summary>{escape(title)}</summary>"
        yield f"<pre>{escape(chr(10).join(lines))}</pre></details>"


def _row(row: Mapping[str, Any]) -> str:
    fault = f": {row['fault']}" if row.get("fault") else ""
    return f"{row['file']} {row['unit']} {row['number']}{fault}"


def _counts(part: Mapping[str, Any]) -> dict[str, int]:
    return {
        "samples": part["samples"],
        "tokens": part["tokens"],
        "supervised": part["supervised_tokens"],
    }
