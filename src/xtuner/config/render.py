"""Write settings as a commented file in the five parts, which reads back to the same settings."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from xtuner.config.schema import PARTS, Settings, field_parts

_WIDTH = 100
_COMMENT_COLUMN = 40
_FEW = {
    "pretrained_model_name_or_path": "a folder, or a name on the hub",
    "tuning": "'full', 'lora' or 'qlora' (4 bits: the least memory)",
    "lora_r": "rank of the adapters: more learns more, and costs memory",
    "lora_alpha": "scale of the adapters: lora_alpha / lora_r",
    "lora_dropout": "",
    "data_path": "a file, a folder, a name on the hub, or a list of these",
    "dataset_format": "'auto' decides by the columns; one, or one a source",
    "prompt_template": "'auto' is the tokenizer's own chat template",
    "SYSTEM": "system message for conversations without one",
    "max_length": "most tokens in a sample or pack",
    "pack_to_max_length": "several samples a row, kept apart: faster, same result",
    "dataloader_num_workers": "processes that prepare batches",
    "batch_size": "per device",
    "accumulative_counts": "batches added up before a step",
    "max_epochs": "",
    "max_steps": "stop after this many steps; None: max_epochs decides",
    "optim_type": "of torch.optim, or 'PagedAdamW32bit', 'AdamW8bit', ...",
    "lr": "",
    "betas": "",
    "weight_decay": "",
    "max_norm": "gradients are scaled down to this norm",
    "warmup_ratio": "share of the steps in which lr rises",
    "evaluation_inputs": "asked before, during and after training",
    "evaluation_freq": "every so many steps",
    "save_steps": "every so many steps; the end is always saved",
    "save_total_limit": "checkpoints to keep; -1 keeps all",
}
"""What a copied file always has, with a word on each; everything else only where it is set."""

_PLAIN_IF_ONE = ("data_path", "dataset_format", "lora_target_modules")
"""Lists that are written as one text when they have one item."""


def render(values: Mapping[str, Any], *, title: str) -> str:
    """Write `values` as a settings file with what a user may want to change.

    Args:
        values: settings by name; those that are absent have their defaults.
        title: the first lines of the file.
    """
    without = {"lora_r", "lora_alpha", "lora_dropout"} if values.get("tuning") == "full" else set()
    if values.get("algorithm") == "pretrain":
        without |= {"SYSTEM"}
    defaults = {name: Settings.model_fields[name].default for name in _FEW}
    shown = {name: value for name, value in defaults.items() if name not in without}
    changed = {
        name: value
        for name, value in values.items()
        if name in _FEW or not _same(value, Settings.model_fields[name].default)
    }
    return _file({**shown, **changed}, comments=_FEW, title=title)


def render_all(settings: Settings, *, title: str) -> str:
    """Write all settings, without a comment on each: the record of a run."""
    return _file(settings.model_dump(), comments={}, title=title)


def literal(name: str, value: Any) -> str:
    """Write the value of setting `name` on one line."""
    if name in _PLAIN_IF_ONE and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    return _literal(value)


def _file(values: Mapping[str, Any], *, comments: Mapping[str, str], title: str) -> str:
    sections = [_docstring(title)]
    parts = field_parts()
    for part in PARTS:
        names = [name for name in part.model_fields if name in values and parts[name] is part]
        if names:
            lines = [_assignment(n, values[n], comment=comments.get(n, "")) for n in names]
            sections.append("\n".join([*_heading(part.__doc__ or ""), *lines]))
    return "\n\n".join(sections) + "\n"


def _heading(text: str) -> list[str]:
    rule = "#" * 70
    return [rule, f"# {text.strip()}", rule]


def _docstring(text: str) -> str:
    # A quote or a backslash in a name must not end the docstring.
    safe = text.replace("\\", "/").replace('"""', "'''")
    return f'"""{safe}"""' if "\n" not in safe else f'"""{safe}\n"""'


def _assignment(name: str, value: Any, *, comment: str) -> str:
    line = f"{name} = {literal(name, value)}"
    if len(line) > _WIDTH:
        line = f"{name} = {_long(value)}"
        return f"# {comment}\n{line}" if comment else line
    if not comment:
        return line
    beside = f"{line:<{_COMMENT_COLUMN}}  # {comment}"
    return beside if len(beside) <= _WIDTH else f"# {comment}\n{line}"


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        items = [_literal(item) for item in value]
        if len(items) == 2 and all(isinstance(item, float) for item in value):
            return f"({', '.join(items)})"
        return f"[{', '.join(items)}]"
    return repr(value)


def _long(value: Any) -> str:
    """A value that needs several lines: one item of a list each, a text in pieces."""
    if isinstance(value, str):
        return f"(\n{_indented(_pieces(value))}\n)"
    return f"[\n{_indented(_items(value))}\n]"


def _items(values: Iterable[Any]) -> list[str]:
    lines: list[str] = []
    for value in values:
        *before, last = _pieces(value) if isinstance(value, str) else [_literal(value)]
        lines += [*before, f"{last},"]
    return lines


def _pieces(text: str) -> list[str]:
    parts = re.findall(rf".{{1,{_WIDTH - 20}}}(?:\s|$)|.{{1,{_WIDTH - 20}}}", text, flags=re.DOTALL)
    return [_text(part) for part in parts] or [_text(text)]


def _indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if "'" in text and '"' not in text else repr(text)


def _number(value: float) -> str:
    """The shortest form that reads back to `value`; 2e-4 rather than 0.0002."""
    if not 0 < abs(value) < 1e-2:
        return repr(value)
    for digits in range(17):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if float(text) == value:
            return text
    return repr(value)


def _same(left: Any, right: Any) -> bool:
    """Whether two forms of a setting mean the same; a list and a tuple do."""
    as_list = [list(v) if isinstance(v, list | tuple) else v for v in (left, right)]
    return bool(as_list[0] == as_list[1])
