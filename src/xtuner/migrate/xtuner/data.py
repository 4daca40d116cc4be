"""The data of an old config: sources, formats, template, system message, length and packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, use_all, written
from xtuner.migrate.xtuner.sources import VERBATIM, Source, Sources
from xtuner.migrate.xtuner.systems import text_of
from xtuner.migrate.xtuner.template import carry_template

_ORDERED = ("DefaultSampler", "SequenceParallelSampler", "InternRepoSampler")


def read(config: Table, draft: Draft) -> None:
    """Translate ``train_dataloader``."""
    loader = config.table("train_dataloader")
    data = loader.take("dataset")
    if not isinstance(data, Table):
        draft.refuse(config.line_of("train_dataloader"), "train_dataloader.dataset", "is missing")
        return
    read_data(data, config, draft)
    if not draft.refused and not draft.not_yet:
        _loader(loader, draft)


def read_data(data: Table, config: Table, draft: Draft) -> None:
    """Translate the data set `data`."""
    found = Sources(draft)
    found.read(data)
    if draft.refused or draft.not_yet or not found.sources:
        return
    _sources(found.sources, draft)
    _layout(found.sources, draft)
    _messages(found.sources, config, draft)


def _sources(sources: list[Source], draft: Draft) -> None:
    entries = [entry for source in sources for entry in source.entries]
    draft.set("data_path", entries, sources[0].line)
    formats = [source.format for source in sources for _ in source.entries]
    if len(set(formats)) == 1:
        formats = formats[:1]
    draft.set("dataset_format", formats, sources[0].line)
    for name, attribute in (("dataset_split", "split"), ("image_folder", "image_folder")):
        one = _agreed(sources, attribute, name, draft)
        if one is not None and one != "train":
            draft.set(name, one, sources[0].line)
    limits = {source.limit for source in sources}
    if len(sources) == 1 and None not in limits:
        draft.set("max_dataset_length", sources[0].limit, sources[0].line)
    elif limits != {None}:
        draft.refuse(
            sources[0].line,
            f"max_dataset_length = {written(sorted(limits, key=str))}",
            "applies to all sources together; use data_repeats with one number per source",
        )
    if draft.values.get("visual_encoder_name_or_path"):
        square = _agreed(sources, "square", "pad_image_to_square", draft)
        draft.set("pad_image_to_square", bool(square), sources[0].line)


def _layout(sources: list[Source], draft: Draft) -> None:
    length = _agreed(sources, "max_length", "max_length", draft)
    draft.set("max_length", length if length is not None else 2048, sources[0].line)
    packed = bool(_agreed(sources, "packed", "pack_to_max_length", draft))
    draft.set("pack_to_max_length", packed, sources[0].line)
    if draft.values["dataset_format"] == ["pretrain"]:
        draft.set("algorithm", "pretrain", sources[0].line)
        draft.set("overlong", "truncate", sources[0].line)
        draft.note(
            sources[0].line,
            "pretrain_map_fn",
            "texts longer than max_length are truncated as before; overlong = 'split' trains on "
            "all of them. Unlike before, each text ends with an end token",
        )
    elif "pretrain" in draft.values["dataset_format"]:
        draft.refuse(sources[0].line, "pretrain_map_fn", "texts cannot be mixed with conversations")


def _messages(sources: list[Source], config: Table, draft: Draft) -> None:
    """Translate the template and the system message."""
    line = sources[0].line
    templates = {written(source.template): source for source in sources}
    if len(templates) > 1:
        draft.refuse(line, f"templates {', '.join(templates)}", "must be the same for all sources")
        return
    template = sources[0].template
    if draft.values.get("algorithm") == "pretrain":
        draft.set("prompt_template", "plain", line)
    elif template == VERBATIM:
        draft.set("prompt_template", VERBATIM, line)
    elif template is None:
        draft.refuse(line, "template_map_fn", "is missing, but the rows are not plain text")
    else:
        carry_template(template, sources[0].template_line, config, draft)
    systems = {source.system for source in sources}
    if len(systems) > 1:
        draft.refuse(line, "dataset_map_fn", "the sources have different system messages")
        return
    draft.set("SYSTEM", systems.pop(), line)


def _loader(loader: Table, draft: Draft) -> None:
    draft.carry(loader, "batch_size", "batch_size", 1)
    draft.carry(loader, "num_workers", "dataloader_num_workers", 0)
    loader.pass_over("pin_memory", "persistent_workers", "prefetch_factor")
    sampler = loader.table("sampler")
    sampler.pass_over("type", "seed", "round_up", "mega_batch_mult")
    kind, line = sampler.last(), loader.line_of("sampler")
    batches = loader.table("batch_sampler")
    batches.pass_over("type", "drop_last", "batch_size")
    shuffle = bool(sampler.take("shuffle", True))
    draft.set("shuffle", shuffle, line)
    if kind == "LengthGroupedSampler":
        _grouped(sampler, line, draft)
    elif draft.values.get("visual_encoder_name_or_path"):
        draft.set("group_by_modality", False, line)
    if kind not in (*_ORDERED, "LengthGroupedSampler", ""):
        draft.refuse(line, shown("sampler", sampler.get("type")), "is not supported")
    collate = loader.table("collate_fn")
    if collate.last() not in ("default_collate_fn", ""):
        line = collate.line_of("type")
        draft.lose(line, shown("collate_fn", collate.get("type")), "the default collation is used")
    use_all(collate)


def _grouped(sampler: Table, line: int, draft: Draft) -> None:
    by = sampler.take("length_property", "length")
    sampler.pass_over("per_device_batch_size")
    if by == "modality_length" and draft.values.get("visual_encoder_name_or_path"):
        draft.set("group_by_modality", True, line)
    else:
        draft.lose(line, shown("length_property", by), "rows are not grouped by length")


def _agreed(sources: list[Source], attribute: str, name: str, draft: Draft) -> Any:
    """The common value of all sources."""
    values = [getattr(source, attribute) for source in sources]
    if any(value != values[0] for value in values):
        line = sources[1].line
        text = ", ".join(dict.fromkeys(map(written, values)))
        draft.refuse(line, f"{name} = {text}", "must be the same for all sources")
    return values[0]


@dataclass(frozen=True)
class Asked:
    """The system message of sample answers and its line."""

    text: str
    line: int


def asked_system(hook: Table, draft: Draft) -> Asked | None:
    """The system message of sample answers."""
    value = hook.take("system", "")
    text = text_of(value, hook.line_of("system"), draft)
    if text is None:
        draft.lose(hook.line_of("system"), shown("system", value), "is not a known system message")
        return None
    return Asked(text, hook.line_of("system"))
