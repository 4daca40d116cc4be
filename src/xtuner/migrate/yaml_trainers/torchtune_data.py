"""Translate the data and the tokenizer of a torchtune file."""

from __future__ import annotations

from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, written

_ALPACA = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
}
_LOCAL = ("json", "csv", "parquet", "text")
NO_LIMIT = 8192
"""max_length if torchtune sets no limit; a longer sample is an error."""


def read(table: Table, draft: Draft) -> None:
    """Translate ``dataset``, ``tokenizer`` and ``shuffle``."""
    given = table.take("dataset" if "dataset" in table else "datasets")
    line = table.line_of("dataset")
    parts = given if isinstance(given, list) else [given]
    if not all(isinstance(part, Table) for part in parts) or not parts:
        draft.refuse(line, "dataset", "is not a data set")
        return
    entries: list[str] = []
    formats: list[str] = []
    supervised: set[bool] = set()
    for part in parts:
        found = _source(part, draft)
        entries += found[0]
        formats += [found[1]] * len(found[0])
        supervised.add(found[2])
    packs = {bool(part.take("packed", False)) for part in parts}
    if draft.refused:
        return
    draft.set("data_path", entries, line)
    draft.set("dataset_format", formats if len(set(formats)) > 1 else formats[:1], line)
    if len(supervised) > 1 or len(packs) > 1:
        draft.refuse(line, "train_on_input, packed", "must be the same for all data sets")
    if True in supervised:
        draft.set("algorithm", "pretrain", line)
    _length(table, draft, packed=True in packs)
    draft.set("shuffle", bool(table.take("shuffle", True)), table.line_of("shuffle"))
    text = formats and set(formats) == {"pretrain"}
    draft.set("prompt_template", "plain" if text else "auto", table.line_of("tokenizer"))
    if not text:
        draft.note(
            table.line_of("tokenizer"),
            written(table.table("tokenizer").get("_component_")),
            "the chat template of the model is used",
        )


def _source(part: Table, draft: Draft) -> tuple[list[str], str, bool]:
    """The entries of `data_path`, the dataset_format, and whether all tokens are trained on."""
    kind, line = part.last("_component_"), part.line_of("_component_")
    part.pass_over("packed", "split_across_pack")
    for key in ("new_system_prompt", "filter_fn", "column_map"):
        if (value := part.take(key)) is not None:
            draft.refuse(part.line_of(key), shown(key, value), "is not supported")
    if kind in _ALPACA:
        entries = _entries(part, _ALPACA[kind], draft)
        return entries, "alpaca_prompted", bool(part.take("train_on_input", True))
    if kind == "text_completion_dataset":
        if part.take("column", "text") != "text" or part.take("add_eos", True) is not True:
            draft.refuse(line, kind, "texts must be in column 'text', with an end token")
        return _entries(part, None, draft), "pretrain", True
    if kind == "instruct_dataset":
        return _entries(part, None, draft), "io", bool(part.take("train_on_input", False))
    if kind == "chat_dataset":
        style, column = part.take("conversation_style"), part.take("conversation_column")
        known = {("openai", "messages"): "openai", ("sharegpt", "conversations"): "sharegpt"}
        format = known.get((style, column))
        if format is None:
            draft.refuse(line, f"{style} in column {column}", "rename the column in the data")
        supervised = bool(part.take("train_on_input", False))
        return _entries(part, None, draft), format or "auto", supervised
    draft.refuse(line, f"dataset: {kind}", "is not supported; use chat_dataset")
    return [], "auto", False


def _entries(part: Table, default: str | None, draft: Draft) -> list[str]:
    source, files = part.take("source", default), part.take("data_files")
    split = part.take("split", "train")
    if split != "train":
        draft.set("dataset_split", split, part.line_of("split"))
    subset = part.take("name")
    if source in _LOCAL:
        names: Any = [files] if isinstance(files, str) else files
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return list(names)
        draft.refuse(
            part.line_of("data_files"), shown("data_files", files), "contains no file names"
        )
        return []
    if not isinstance(source, str) or files is not None:
        draft.refuse(part.line_of("source"), shown("source", source), "is not a hub data set")
        return []
    return [f"{source}:{subset}" if subset else source]


def _length(table: Table, draft: Draft, *, packed: bool) -> None:
    tokenizer = table.table("tokenizer")
    tokenizer.pass_over(
        *(key for key in tokenizer if key not in ("max_seq_len", "prompt_template"))
    )
    if (template := tokenizer.take("prompt_template")) is not None:
        line = tokenizer.line_of("prompt_template")
        draft.refuse(line, shown("prompt_template", template), "is not supported")
    limit, line = tokenizer.take("max_seq_len"), tokenizer.line_of("max_seq_len")
    draft.set("pack_to_max_length", packed, table.line_of("dataset"))
    draft.set("max_length", limit if limit is not None else NO_LIMIT, line)
    if limit is None:
        draft.set("overlong", "error", line)
        draft.note(
            line,
            "max_seq_len: null",
            f"is unlimited; in xtuner a sample of more than {NO_LIMIT} tokens is an error",
        )
    elif draft.values.get("algorithm") == "pretrain":
        draft.set("overlong", "truncate", line)
