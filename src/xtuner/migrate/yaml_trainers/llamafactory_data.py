"""Translate the data sets of a LLaMA-Factory file, which are entries of dataset_info.json."""

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
    """Translate ``dataset``, ``dataset_dir`` and the mixing of data sets."""
    named, line = table.take("dataset"), table.line_of("dataset")
    names = named if isinstance(named, list) else str(named or "").split(",")
    names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        draft.refuse(line, shown("dataset", named), "is not a data set")
        return
    where = table.take("dataset_dir", "data")
    info_path = _find_info(where, folder, line, draft)
    info = None if info_path is None else _info(info_path, line, draft)
    if info_path is None or info is None:
        return
    found = [_entry(name, info.get(name), line, draft) for name in names]
    entries = [entry for entry in found if entry is not None]
    if len(entries) < len(names):
        return
    home = Path(str(where))
    draft.set("data_path", [path if hub else str(home / path) for path, _, hub in entries], line)
    formats = [format for _, format, _ in entries]
    draft.set("dataset_format", formats if len(set(formats)) > 1 else formats[:1], line)
    _limit(table, [None if hub else info_path.parent / path for path, _, hub in entries], draft)
    _mix(table, draft)


def _limit(table: Table, files: list[Path | None], draft: Draft) -> None:
    """Translate ``max_samples``, which limits each data set; fractions if there are several."""
    limit, line = table.take("max_samples"), table.line_of("max_samples")
    if not isinstance(limit, int):
        return
    what = f"max_samples: {limit}"
    if len(files) == 1:
        draft.set("max_dataset_length", limit, line)
        draft.note(line, what, "rows are sampled at random, not the first ones")
        return
    counts = [None if file is None else _rows(file) for file in files]
    if None in counts:
        draft.refuse(
            line,
            what,
            f"limits each of {len(files)} data sets, but the rows of one of them cannot be "
            "counted; remove it and set data_repeats, one fraction per source",
        )
    elif any(count > limit for count in counts if count):
        draft.set("data_repeats", [min(1.0, limit / (count or 1)) for count in counts], line)
        draft.note(line, what, "becomes a fraction of each source, sampled at random")


def _rows(file: Path) -> int | None:
    """The number of rows of a JSON file, or None if it is expensive to count."""
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
        draft.refuse(line, f"mix_strategy: {strategy}", "use data_weights instead")
    table.pass_over("interleave_probs", "media_dir")


def _find_info(where: Any, folder: Path, line: int, draft: Draft) -> Path | None:
    """The path of dataset_info.json, in the working directory or next to the file."""
    candidates = [base / str(where) / _INFO for base in dict.fromkeys((Path.cwd(), folder))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        draft.refuse(
            line,
            f"dataset_dir: {where}",
            f"data sets are defined in {_INFO}, which was not found (searched for "
            f"{', '.join(map(str, candidates))})",
        )
    return path


def _info(path: Path, line: int, draft: Draft) -> dict[str, Any] | None:
    """The entries of dataset_info.json."""
    try:
        info = json.loads(read_text(path))
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        draft.refuse(line, str(path), "is not a JSON object")
        return None
    return info


def _entry(name: str, info: Any, line: int, draft: Draft) -> tuple[str, str, bool] | None:
    """Path or hub name, dataset_format, and whether it is on the hub; None if not supported."""
    if not isinstance(info, dict):
        draft.refuse(line, f"dataset: {name}", f"is not in {_INFO}")
        return None
    if info.get("ranking"):
        draft.postpone(line, f"dataset: {name}", "preference tuning is not supported yet")
        return None
    path, hub = info.get("file_name"), info.get("hf_hub_url")
    if info.get("folder") or info.get("num_samples") or not (path or hub):
        draft.refuse(line, f"dataset: {name}", "must be a single file or hub data set")
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
    unusual = {k: v for k, v in columns.items() if _OWN_COLUMNS.get(k, v) != v}
    given = {k: v for k, v in columns.items() if k not in _OWN_COLUMNS}
    if kind == "alpaca" and not unusual and all(_ALPACA.get(k) == v for k, v in given.items()):
        return "alpaca"
    if kind == "alpaca" and given == {"prompt": "text"}:
        return "pretrain"
    if kind in ("sharegpt", "openai") and not unusual and set(given) <= {"messages", "images"}:
        messages = given.get("messages", "conversations")
        if messages == "conversations" and _fit(tags, _SHAREGPT_TAGS):
            return "sharegpt"
        if messages == "messages" and (kind == "openai" or (tags and _fit(tags, _OPENAI_TAGS))):
            return "openai"
    draft.refuse(
        line,
        f"dataset: {name}",
        f"its columns and tags in {_INFO} do not match a supported format; rename them in the data",
    )
    return None


def _fit(tags: dict[str, Any], known: dict[str, str]) -> bool:
    return all(known.get(key, value) == value for key, value in tags.items())
