"""Translate the data sets of an old config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Dotted, Table, last_part, use_all
from xtuner.migrate.xtuner.map_function import format_of
from xtuner.migrate.xtuner.model import check_tokenizer
from xtuner.migrate.xtuner.names import names

_LOCAL = ("json", "csv", "parquet", "text")
FORMAT_END = "_format.py"
"""Suffix of the file with the format of a migrated config."""
VERBATIM = "verbatim"
"""Used instead of a template for data that already contain role markers."""


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        entries: Entries of `data_path`.
        format: The dataset_format.
        system: The system message that the dataset_map_fn adds to each conversation.
        template: A table, a dotted name, or None.
        limit: Maximum number of rows, or None.
        packed: Whether samples are packed.
    """

    entries: tuple[str, ...]
    format: str
    system: str
    template: Any
    template_line: int
    max_length: int | None
    packed: bool
    line: int
    split: str | None = "train"
    limit: int | None = None
    image_folder: str | None = None
    square: bool = False


class Sources:
    """Collects the data sets below ``train_dataloader.dataset``."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.sources: list[Source] = []

    def read(self, data: Table) -> None:
        """Add the data set `data`, or those that it concatenates."""
        kind, line = data.last(), data.line_of("type")
        if kind == "ConcatDataset":
            for each in data.listed("datasets"):
                if not isinstance(each, Table):
                    raise TypeError(f"a data set in line {data.line_of('datasets')} is not a dict")
                self.read(each)
            data.pass_over("datasets_kwargs")
        elif reason := names("datasets").get(kind):
            self._draft.refuse(line, f"type = {kind}", reason)
        elif kind == "process_hf_dataset":
            self._add(self._hf(data))
        elif kind == "MOSSSFTDataset":
            self._add(self._moss(data))
        elif kind == "LLaVADataset":
            self._add(self._llava(data))
        else:
            self._draft.refuse(line, shown("dataset.type", data.get("type")), "is not supported")

    def _add(self, source: Source | None) -> None:
        if source is not None:
            self.sources.append(source)

    def _hf(self, data: Table) -> Source | None:
        data.pass_over("remove_unused_columns", "shuffle_before_pack", "use_varlen_attn")
        data.pass_over("map_num_proc", "input_ids_with_output", "with_image_token")
        check_tokenizer(data.table("tokenizer"), self._draft)
        line = data.line
        self._refuse_unusual(data)
        split = data.take("split", "train")
        entries, split = self._entries(data.take("dataset"), data.line_of("dataset"), split)
        format, system = self._format(data)
        template, template_line = _template(data, self._draft)
        return Source(
            entries=entries,
            format=format,
            system=system,
            template=template,
            template_line=template_line,
            max_length=data.take("max_length"),
            packed=bool(data.take("pack_to_max_length", True)),
            line=line,
            split=split,
            limit=data.take("max_dataset_length"),
        )

    def _moss(self, data: Table) -> Source:
        """Conversations of moss-003-sft, trained verbatim."""
        check_tokenizer(data.table("tokenizer"), self._draft)
        name, line = data.take("bot_name"), data.line_of("bot_name")
        format = "moss_verbatim"
        if name is not None:
            self._draft.files[FORMAT_END] = (
                '"""The data format of the migrated config next to this file."""\n\n'
                "from xtuner.data.formats.moss_verbatim import reader\n\n"
                f"to_messages = reader({str(name)!r})\n"
            )
            format = f"{{stem}}{FORMAT_END}:to_messages"
        self._draft.note(
            line,
            "MOSSSFTDataset",
            "conversations longer than max_length are truncated at max_length, not after the last "
            "complete turn",
        )
        return Source(
            entries=(str(data.take("data_file")),),
            format=format,
            system="",
            template=VERBATIM,
            template_line=data.line,
            max_length=data.take("max_length", 2048),
            packed=False,
            line=data.line,
        )

    def _refuse_unusual(self, data: Table) -> None:
        if not data.take("do_dataset_tokenization", True):
            line = data.line_of("do_dataset_tokenization")
            self._draft.refuse(
                line, "do_dataset_tokenization = False", "token ids are not supported; use text"
            )
        if renamed := data.take("rename_maps"):
            line = data.line_of("rename_maps")
            self._draft.refuse(
                line, shown("rename_maps", renamed), "rename the columns in the data"
            )

    def _llava(self, data: Table) -> Source | None:
        data.pass_over("image_processor")
        check_tokenizer(data.table("tokenizer"), self._draft)
        processor = data.get("image_processor")
        encoder = self._draft.values.get("visual_encoder_name_or_path")
        if isinstance(processor, Table):
            name = processor.get("pretrained_model_name_or_path")
            if name != encoder:
                self._draft.refuse(
                    processor.line, f"image_processor = {name}", f"must be that of {encoder}"
                )
            use_all(processor)
        path = data.take("data_path")
        if data.take("offline_processed_text_folder") is not None or not isinstance(path, str):
            self._draft.refuse(
                data.line,
                "offline_processed_text_folder",
                "set data_path: tokenized rows are cached",
            )
            return None
        format, system = self._format(data)
        template, template_line = _template(data, self._draft)
        return Source(
            entries=(path,),
            format=format,
            system=system,
            template=template,
            template_line=template_line,
            max_length=data.take("max_length", 2048),
            packed=False,
            line=data.line,
            limit=data.take("max_dataset_length"),
            image_folder=data.take("image_folder"),
            square=bool(data.take("pad_image_to_square", False)),
        )

    def _format(self, data: Table) -> tuple[str, str]:

        value, line = data.take("dataset_map_fn"), data.line_of("dataset_map_fn")
        return format_of(value, line, self._draft)

    def _entries(self, given: Any, line: int, split: Any) -> tuple[tuple[str, ...], Any]:
        """The entries of `data_path`, and the split."""
        if not isinstance(given, Table):
            self._draft.refuse(line, shown("dataset", given), "is not a supported data set")
            return (), split
        kind = last_part(given.name())
        if kind == "load_jsonl_dataset" or kind == "load_json_file":
            return self._files(given.take("data_files") or given.take("data_dir"), line), split
        path = given.take("path")
        if kind == "load_from_disk":
            return (str(given.take("dataset_path", path)),), split
        if kind != "load_dataset" or not isinstance(path, str):
            self._draft.refuse(
                given.line,
                shown("type", given.get("type")),
                "loads from an unsupported source; download the data and name the file",
            )
            return (), split
        given.pass_over("ignore_verifications", "trust_remote_code", "num_proc", "cache_dir")
        split = given.take("split", split)
        files, folder = given.take("data_files"), given.take("data_dir")
        if path in _LOCAL:
            if isinstance(files, Table):
                files = files.take(split or "train")
                split = "train"
            return self._files(files if files is not None else folder, given.line), split
        if folder is not None or files is not None:
            self._draft.refuse(
                given.line,
                shown("data_dir" if files is None else "data_files", folder or files),
                f"selects a part of {path}, which is not supported; download it and name the files",
            )
        configuration = given.take("name")
        return (f"{path}:{configuration}" if configuration else path,), split

    def _files(self, files: Any, line: int) -> tuple[str, ...]:
        entries = [files] if isinstance(files, str) else list(files or ())
        if not entries or not all(isinstance(entry, str) for entry in entries):
            self._draft.refuse(line, shown("data_files", files), "contains no file names")
            return ()
        for entry in entries:
            if "*" in entry or "?" in entry:
                self._draft.refuse(
                    line, shown("data_files", entry), "patterns are not supported; name the folder"
                )
        return tuple(entries)


def _template(data: Table, draft: Draft) -> tuple[Any, int]:
    """The template of the rows, and its line."""
    given = data.take("template_map_fn")
    if isinstance(given, Table):
        if given.last() != "template_map_fn_factory":
            line = given.line_of("type")
            draft.refuse(line, shown("template_map_fn", given.get("type")), "is not supported")
        template = given.take("template")
        return template, given.line_of("template")
    return (given if isinstance(given, Dotted | str) else None), data.line_of("template_map_fn")
