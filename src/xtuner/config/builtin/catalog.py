"""The built-in settings. A name combines a model, a recipe, a data set and a number of epochs.

    internlm2_chat_7b _ qlora _ oasst1 _ e3
    └ models.toml       │       │        └ max_epochs
                        │       └ datasets.toml
                        └ algorithms.toml

The number of rows determines the epochs of `custom`; a name may still give a number.
The tables hold only data; adding a model or a data set adds one row. Names of XTuner 0.1 have the
values of its configs (`catalog_xtuner0`).
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable
from typing import Any

from xtuner.config.builtin import catalog_llava, catalog_xtuner0
from xtuner.config.table_files import table
from xtuner.errors import ConfigError, shell_command

_DEFAULT_EPOCHS = 3
AUTO = "auto"
"""`epochs` of a data set whose number of rows determines them; a name may still give a number."""
_ROW_KEYS = ("epochs", "aliases", "models", "note")
"""Keys of a data set row that are not settings."""


def names(pattern: str = "") -> list[str]:
    """List the built-in names.

    Args:
        pattern: A substring, matched case-insensitively, or a pattern with ``*`` and ``?``. Aliases
            of data sets match too.
    """
    matches = _matcher(pattern.lower())
    old = [name for name in catalog_xtuner0.names() if matches(name.lower())]
    with_images = [name for name in catalog_llava.names(_llava_models()) if matches(name)]
    new = with_images + [
        f"{model}_{recipe}_{data}{_suffix(epochs)}"
        for model, model_row in _models().items()
        for recipe in _recipes()
        for data, row in _data_sets().items()
        if row.get("models", model_row["kind"]) == model_row["kind"]
        for epochs in [row.get("epochs", _DEFAULT_EPOCHS)]
        if any(
            matches(f"{model}_{recipe}_{alias}{_suffix(epochs)}")
            for alias in (data, *row.get("aliases", ()))
        )
    ]
    return [*old, *(name for name in new if catalog_xtuner0.listed_name(name) is None)]


def _suffix(epochs: int | str) -> str:
    """The end of a name; empty if the number of rows determines the epochs."""
    return "" if epochs == AUTO else f"_e{epochs}"


def is_name(name: str) -> bool:
    """Whether `name` is a built-in name, with any number of epochs."""
    found = catalog_xtuner0.listed_name(name) or _split(name)
    return bool(found or catalog_llava.split(name, _llava_models()))


def compose(name: str, *, suffix: str = "") -> dict[str, Any]:
    """Return the settings of the built-in `name`; absent settings have their defaults.

    Args:
        name: One that `names` lists, with any number of epochs.
        suffix: Appended to the file name when the settings are copied to a file; the second stage
            of LLaVA needs it to find the work dir of the first.

    Raises:
        ConfigError: Unknown name; the message suggests close ones.
    """
    if (old := catalog_xtuner0.compose(name, suffix=suffix)) is not None:
        return old
    if reason := catalog_xtuner0.missing().get(name):
        raise ConfigError(f"{name} {reason}")
    if image_name := catalog_llava.split(name, _llava_models()):
        return catalog_llava.compose(image_name, _of_model(image_name.model), suffix=suffix)
    parts = _split(name)
    if parts is None:
        raise ConfigError(_unknown(name))
    model, recipe, data, epochs = parts
    model_row, data_row = _models()[model], _data_sets()[data]
    if data_row.get("models", model_row["kind"]) != model_row["kind"]:
        raise ConfigError(f"{name}: '{data}' is for base models, but {model} is a chat model")
    of_model = _of_model(model)
    return {
        **of_model,
        **_recipes()[recipe],
        **of_model,
        **{key: value for key, value in data_row.items() if key not in _ROW_KEYS},
        **({} if epochs == AUTO else {"max_epochs": epochs}),
    }


def note(name: str) -> str:
    """Manual steps before the built-in `name` can be trained; often empty."""
    if old := catalog_xtuner0.note(name):
        return old
    if image_name := catalog_llava.split(name, _llava_models()):
        return catalog_llava.note(image_name)
    parts = _split(name)
    return _data_sets()[parts[2]].get("note", "") if parts else ""


def models() -> dict[str, str]:
    """The names of the models, and their names on the hub."""
    return {name: row["path"] for name, row in _models().items()}


def recipe(name: str) -> dict[str, Any]:
    """The settings of recipe `name`: 'full', 'lora' or 'qlora'."""
    return dict(_recipes()[name])


def _of_model(model: str) -> dict[str, Any]:
    row = _models()[model]
    return {
        "pretrained_model_name_or_path": row["path"],
        **table("models")["kinds"][row["kind"]],
        **{key: value for key, value in row.items() if key not in ("path", "kind", "llava")},
    }


def _llava_models() -> list[str]:
    """The chat models that can be the language model of LLaVA."""
    rows = _models().items()
    return [name for name, row in rows if row["kind"] == "chat" and row.get("llava", True)]


def _models() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = table("models")["models"]
    return rows


def _recipes() -> dict[str, dict[str, Any]]:
    return table("algorithms")


def _data_sets() -> dict[str, dict[str, Any]]:
    return table("datasets")


@functools.cache
def _data_names() -> dict[str, str]:
    """Map the name and aliases of each data set to its row."""
    rows = _data_sets()
    aliases = {alias: name for name, row in rows.items() for alias in row.get("aliases", [])}
    return aliases | {name: name for name in rows}


def _split(name: str) -> tuple[str, str, str, int | str] | None:
    """Split `name` into model, recipe, data set and epochs; None if one of them is unknown."""
    match = re.fullmatch(r"(?P<rest>\w+?)(_e(?P<epochs>[1-9]\d{0,3}))?", name, flags=re.ASCII)
    if match is None:
        return None
    for recipe in _recipes():
        model, found, data = match["rest"].partition(f"_{recipe}_")
        if not (found and model in _models() and data in _data_names()):
            continue
        row = _data_names()[data]
        if match["epochs"]:
            return model, recipe, row, int(match["epochs"])
        return (model, recipe, row, AUTO) if _data_sets()[row].get("epochs") == AUTO else None
    return None


def _matcher(pattern: str) -> Callable[[str], bool]:
    if "*" in pattern or "?" in pattern:
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: pattern in name


def _unknown(name: str) -> str:
    close = _close_names(name)
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    word = next((model for model in _models() if close and close[0].startswith(model)), "WORD")
    return (
        f"{name}: no settings file or built-in of that name{guess}\n"
        f"  Search with `{shell_command('xtuner', 'list-cfg', '-p', word)}`. A name consists of a "
        f"model, a recipe ({', '.join(_recipes())}), a data set, and e followed by the number of "
        "epochs (not needed after custom)"
    )


def _close_names(name: str) -> list[str]:
    """Built-in names close to `name`, matched part by part: comparing with every name is slow."""
    if name.startswith("llava_"):
        return difflib.get_close_matches(name, catalog_llava.names(_llava_models()), n=2)
    rest, _, epochs = name.rpartition("_e") if re.search(r"_e\d*$", name) else (name, "", "")
    for recipe in _recipes():
        model, found, data = rest.partition(f"_{recipe}_")
        if not found:
            continue
        close = [model] if model in _models() else difflib.get_close_matches(model, _models(), n=2)
        data_sets = difflib.get_close_matches(data, _data_names(), n=1, cutoff=0.5) or ["custom"]
        row = _data_names()[data_sets[0]]
        number = epochs.lstrip("0") or _data_sets()[row].get("epochs", _DEFAULT_EPOCHS)
        return [f"{model}_{recipe}_{row}{_suffix(number)}" for model in close]
    return [n for n in names() if n.startswith(f"{rest}_")][:2]
