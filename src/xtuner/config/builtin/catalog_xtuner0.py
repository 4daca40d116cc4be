"""The built-in settings under the names of XTuner 0.1, with the values of its configs.

    internlm2_1_8b _ qlora _ alpaca _ e3        [all] < recipe < model < data < [exceptions]

Any number of epochs may be given. Names that cannot be composed have a reason.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

from xtuner.config.builtin import catalog_llava
from xtuner.config.table_files import table

_ROW_KEYS = ("path", "newer", "texts", "stage", "first")
"""Keys of a row that are not settings."""
_TEXTS = ("SYSTEM", "evaluation_inputs")
_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_EPOCHS = re.compile(r"_e\d+(?=_|$)")


class Parts(NamedTuple):
    """The parts of a name."""

    model: str
    recipe: str
    data: str
    epochs: int


@functools.cache
def names() -> tuple[str, ...]:
    """All names that can be composed, sorted; those for the user's own data come last."""
    return tuple(sorted({*_parts(), *_table()["llava"]}, key=lambda name: ("custom" in name, name)))


@functools.cache
def missing() -> dict[str, str]:
    """Names that cannot be composed, and the reason."""
    return {name: row["reason"] for row in _table()["missing"] for name in row["names"].split()}


def listed_name(name: str) -> str | None:
    """The name in the table that corresponds to `name`, with any number of epochs; None if there is
    none."""
    if name in _parts() or name in _table()["llava"]:
        return name
    epochs = _EPOCHS.search(name)
    if epochs is None or not re.fullmatch(r"_e[1-9]\d{0,3}", epochs[0]):
        return None
    return _by_end().get(_EPOCHS.sub("_e", name, count=1))


def compose(name: str, *, suffix: str = "") -> dict[str, Any] | None:
    """The settings of `name`; None if it is not a name of XTuner 0.1.

    Args:
        name: One of `names`, with any number of epochs.
        suffix: Appended to the file name when the settings are copied to a file; the second stage
            of LLaVA needs it to find the work dir of the first.
    """
    known = listed_name(name)
    if known is None:
        return None
    values = _llava(known, suffix) if known in _table()["llava"] else _text(known)
    if known != name:
        values["max_epochs"] = int(_EPOCHS.search(name)[0].removeprefix("_e"))  # type: ignore[index]
    return values


def note(name: str) -> str:
    """Notes and manual steps before the built-in `name` can be trained."""
    known = listed_name(name)
    if known is None:
        return ""
    if known in _table()["llava"]:
        stage = _table()["llava"][known]["stage"]
        lines = [table("llava")["stages"][stage]["note"]]
    else:
        parts = _parts()[known]
        lines = [_texts(parts.data).get("note", "")]
        if newer := _table()["models"][parts.model].get("newer"):
            lines.append(
                "The model runs its own Python code, written for transformers 4, and is rejected "
                f"if that fails under transformers 5; a newer model is {newer}."
            )
    lines.append(
        "The values are those of XTuner 0.1's config of this name; the questions for sample "
        "answers and the system messages are reworded. As there, steps count micro-batches."
    )
    return " ".join(filter(None, lines))


def _text(name: str) -> dict[str, Any]:
    tables, parts = _table(), _parts()[name]
    model, data = tables["models"][parts.model], tables["data"][parts.data]
    values = {
        "pretrained_model_name_or_path": model["path"],
        **({"trust_remote_code": True} if "newer" in model else {}),
        **tables["all"],
        **tables["recipes"][parts.recipe],
        **model,
        **data,
        **{key: value for key, value in _texts(parts.data).items() if key in _TEXTS},
        "max_epochs": parts.epochs,
        **tables["exceptions"].get(name, {}),
    }
    return _settings(values)


def _llava(name: str, suffix: str) -> dict[str, Any]:
    tables, row = _table(), _table()["llava"][name]
    llava = table("llava")
    encoder = llava["encoders"]["clip_vit_large_p14_336"]
    values = {
        "pretrained_model_name_or_path": row["path"],
        "visual_encoder_name_or_path": encoder["path"],
        **tables["all"],
        **llava["stages"][row["stage"]]["settings"],
        **llava["settings"],
        "max_length": catalog_llava.CONTEXT - encoder["tokens"],
        "max_epochs": 1,
        **tables["llava_all"],
        **tables["llava_stages"].get(row["stage"], {}),
        **row,
    }
    if "first" in row:
        values["pretrained_pth"] = f"./work_dirs/{row['first']}{suffix}"
    if values.get("visual_encoder_lora_r") == 0:
        values = {k: v for k, v in values.items() if not k.startswith("visual_encoder_lora")}
    return _settings(values)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without keys of rows and, if there are no adapters, without their settings."""
    left_out = (*_ROW_KEYS, *(_ADAPTER if values["tuning"] == "full" else ()))
    return {key: value for key, value in values.items() if key not in left_out}


def _table() -> dict[str, Any]:
    return table("xtuner_0")


def _texts(data: str) -> dict[str, Any]:
    """The row of datasets.toml with the questions and system message of `data`."""
    row: dict[str, Any] = table("datasets")[_table()["data"][data]["texts"]]
    return row


@functools.cache
def _parts() -> dict[str, Parts]:
    """The parts of each name without images."""
    found = {
        f"{model}_{recipe}_{end}": Parts(model, recipe, *_data(end))
        for end, recipes in _table()["names"].items()
        for recipe, models in recipes.items()
        for model in models.split()
    }
    for name, row in _table()["irregular"].items():
        found[name] = Parts(row["model"], row["recipe"], row["data"], row.get("max_epochs", 3))
    return found


def _data(end: str) -> tuple[str, int]:
    """Data set and epochs at the end of a name."""
    data, _, rest = end.partition("_e")
    while not (match := re.match(r"\d+", rest)) or data not in _table()["data"]:
        more, _, rest = rest.partition("_e")
        data = f"{data}_e{more}"
    return data, int(match[0])


@functools.cache
def _by_end() -> dict[str, str]:
    """Names by their stem, without the number of epochs."""
    return {_EPOCHS.sub("_e", name, count=1): name for name in names()}
