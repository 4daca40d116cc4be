"""The data sets of a LLaMA-Factory file, which it names by their entries in dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table
from xtuner.migrate.xtuner.read import read_text

_INFO = "dataset_info.json"
_MOST_TO_COUNT = 100_000_000
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
}
_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
}
_OWN_COLUMNS = {"system": "system", "tools": "tools", "history": "history"}


def read(table: Table, draft: Draft, folder: Path) -> None:
    """Carry ``dataset``, ``dataset_dir``, and how data sets are mixed."""
    named, line = table.take("dataset"), table.line_of("dataset")
    names = named if isinstance(named, list) else str(named or "").split(",")
    names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        draft.refuse(line, shown("dataset", named), "names no data set")
        return
    where = table.take("dataset_dir", "data")
    place = _place(where, folder, line, draft)
    info = None if place is None else _info(place, line, draft)
    if place is None or info is None:
        return
    found = [_entry(name, info.get(name), line, draft) for name in names]
    entries = [entry for entry in found if entry is not None]
    if len(entries) < len(names):
        return
    home = Path(str(where))
    draft.set("data_path", [path if hub else str(home / path) for path, _, hub in entries], line)
    formats = [format for _, format, _ in entries]
    draft.set("dataset_format", formats if len(set(formats)) > 1 else formats[:1], line)
    _limit(table, [None if hub else place.parent / path for path, _, hub in entries], draft)
    _mix(table, draft)


def _limit(table: Table, files: list[Path | None], draft: Draft) -> None:
    """Carry ``max_samples``, which limits each data set: as shares, where there are several."""
    limit, line = table.take("max_samples"), table.line_of("max_samples")
    if not isinstance(limit, int):
        return
    what = f"max_samples: {limit}"
    if len(files) == 1:
        draft.set("max_dataset_length", limit, line)
        draft.note(line, what, "rows are drawn at random here, not the first")
        return
    counts = [None if file is None else _rows(file) for file in files]
    if None in counts:
        draft.refuse(
            line,
            what,
            f"limits each of {len(files)} data sets, and the rows of one of them cannot be counted "
            "here; give data_repeats, one share a source, and take it out",
        )
    elif any(count > limit for count in counts if count):
        draft.set("data_repeats", [min(1.0, limit / (count or 1)) for count in counts], line)
        draft.note(line, what, "is a share of each source here, drawn at random, not the first")


def _rows(file: Path) -> int | None:
    """The number of rows of a JSON file; None where it cannot be told at once."""
    try:
        if file.stat().st_size > _MOST_TO_COUNT:
            return None
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return sum(1 for line in text.splitlines() if line.strip())
        rows = json.loads(text)
        return len(rows) if isinstance(rows, list) else None
    except (OSError, ValueError, RecursionError):
        return None


def _mix(table: Table, draft: Draft) -> None:
    strategy = table.take("mix_strategy", "concat")
    if strategy != "concat":
        line = table.line_of("mix_strategy")
        draft.refuse(line, f"mix_strategy: {strategy}", "set data_weights here instead")
    table.pass_over("interleave_probs", "media_dir")


def _place(where: Any, folder: Path, line: int, draft: Draft) -> Path | None:
    """Where dataset_info.json is, in the working directory or beside the file."""
    places = [base / str(where) / _INFO for base in (Path.cwd(), folder)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        draft.refuse(
            line,
            f"dataset_dir: {where}",
            f"names of data sets are looked up in {_INFO}, and there is none (looked for "
            f"{', '.join(str(place) for place in places)})",
        )
    return place


def _info(place: Path, line: int, draft: Draft) -> dict[str, Any] | None:
    """The entries of dataset_info.json."""
    try:
        info = json.loads(read_text(place))
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        draft.refuse(line, str(place), "holds no JSON object")
        return None
    return info


def _entry(name: str, info: Any, line: int, draft: Draft) -> tuple[str, str, bool] | None:
    """Path or hub name, our format, and whether it is on the hub; None if it cannot be carried."""
    if not isinstance(info, dict):
        draft.refuse(line, f"dataset: {name}", f"is not in {_INFO}")
        return None
    if info.get("ranking"):
        draft.postpone(line, f"dataset: {name}", "pairs for preference tuning: not part yet")
        return None
    path, hub = info.get("file_name"), info.get("hf_hub_url")
    if info.get("folder") or info.get("num_samples") or not (path or hub):
        draft.refuse(line, f"dataset: {name}", "is neither a file nor a data set of the hub alone")
        return None
    format = _format(name, info, line, draft)
    if format is None:
        return None
    if hub and info.get("split", "train") != "train":
        draft.set("dataset_split", info["split"], line)
    subset = f":{info['subset']}" if info.get("subset") else ""
    return (f"{hub}{subset}", format, True) if hub else (str(path), format, False)


def _format(name: str, info: dict[str, Any], line: int, draft: Draft) -> str | None:
    columns, tags = dict(info.get("columns") or {}), dict(info.get("tags") or {})
    kind = info.get("formatting", "alpaca")
    strange = {k: v for k, v in columns.items() if _OWN_COLUMNS.get(k, v) != v}
    given = {k: v for k, v in columns.items() if k not in _OWN_COLUMNS}
    if kind == "alpaca" and not strange and all(_ALPACA.get(k) == v for k, v in given.items()):
        return "alpaca"
    if kind == "alpaca" and given == {"prompt": "text"}:
        return "pretrain"
    if kind in ("sharegpt", "openai") and not strange and set(given) <= {"messages", "images"}:
        messages = given.get("messages", "conversations")
        if messages == "conversations" and _fit(tags, _SHAREGPT_TAGS):
            return "sharegpt"
        if messages == "messages" and (kind == "openai" or (tags and _fit(tags, _OPENAI_TAGS))):
            return "openai"
    draft.refuse(
        line,
        f"dataset: {name}",
        f"its columns and tags in {_INFO} have other names than the formats here know; rename them "
        "in the data",
    )
    return None


def _fit(tags: dict[str, Any], known: dict[str, str]) -> bool:
    return all(known.get(key, value) == value for key, value in tags.items())
