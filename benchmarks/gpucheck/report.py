"""Writes the results as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpucheck.runner import Outcome

COLUMNS = (
    "tokens_per_second",
    "unit",
    "step_ms",
    "memory_mib",
    "forecast_mib",
    "forecast_ratio",
    "utilization",
    "speedup",
    "note",
)
"""Columns of the speed table; a row may omit some."""


def write(
    outcomes: Sequence[Outcome], *, about: dict[str, Any], json_path: Path, markdown: Path
) -> str:
    """Write both files; return the Markdown."""
    text = as_markdown(outcomes, about)
    parts = []
    for outcome in outcomes:
        part = {
            "name": outcome.part.name,
            "kind": outcome.part.kind,
            "state": outcome.state,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "rows": outcome.rows,
        }
        parts.append(part)
    found = {"about": about, "passed": all(o.passed for o in outcomes), "parts": parts}
    for path, content in ((json_path, json.dumps(found, indent=1)), (markdown, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".draft")
        draft.write_text(content + "\n", encoding="utf-8")
        draft.replace(path)
    return text


def as_markdown(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    """Format all tables."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in about.items())]
    for row in _rows(outcomes, "fact"):
        lines.append(f"- {row['name']}: {row.get('value', '')}")
    lines += [
        "",
        "## Correctness",
        "",
        "| part | check | found | allowed | |",
        "|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        if outcome.part.kind == "correctness":
            lines += [_correctness(outcome.part.name, row) for row in outcome.rows]
    lines += ["", "## Speed and memory", "", *_speed(outcomes)]
    lines += _profile(outcomes)
    lines += ["", "## Parts", "", "| part | state | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {o.part.name} | {o.state} | {o.seconds:.1f} | {_cell(o.reason)} |" for o in outcomes
    ]
    return "\n".join(lines)


def _rows(outcomes: Sequence[Outcome], kind: str) -> list[dict[str, Any]]:
    return [row for outcome in outcomes if outcome.part.kind == kind for row in outcome.rows]


def _correctness(part: str, row: dict[str, Any]) -> str:
    known = {"name", "passed", "found", "allowed"}
    more = ", ".join(f"{key} {_number(row[key])}" for key in row if key not in known)
    verdict = {True: "passed", False: "**FAILED**", None: ""}[row["passed"]]
    found, allowed = (_number(row.get(key, "")) for key in ("found", "allowed"))
    verdict += f" {more}" if more else ""
    return f"| {part} | {_cell(row['name'])} | {found} | {allowed} | {_cell(verdict)} |"


def _speed(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [row for row in _rows(outcomes, "speed") if "profile" not in row]
    lines = [
        "| task | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    ours = {o.part.name: o.rows[0] for o in outcomes if o.rows}
    for row in rows:
        rate = ours.get(row.get("against", ""), {}).get("tokens_per_second")
        if rate and row.get("tokens_per_second"):
            row["speedup"] = rate / row["tokens_per_second"]
        cells = [_cell(_number(row.get(name, ""))) for name in COLUMNS]
        lines.append(f"| {_cell(row['name'])} | " + " | ".join(cells) + " |")
    return lines


def _profile(outcomes: Sequence[Outcome]) -> list[str]:
    lines: list[str] = []
    for row in _rows(outcomes, "speed"):
        if "profile" not in row:
            continue
        lines += ["", f"## Profile: {row['name']}", ""]
        lines += [f"- {key}: {_number(value)}" for key, value in row["profile"].items()]
        for title in ("kernels", "host_operations"):
            lines += [
                "",
                f"| {title.replace('_', ' ')} | ms per step | calls per step |",
                "|---|---|---|",
            ]
            lines += [f"| {_cell(n)[:90]} | {ms:.3f} | {c:.1f} |" for n, ms, c in row[title]]
    return lines


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())
