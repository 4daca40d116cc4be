"""The built-in settings: a model, a recipe, a data set and a number of epochs make a name.

    internlm2_chat_7b _ qlora _ oasst1 _ e3
    └ models.toml       │       │        └ max_epochs
                        │       └ datasets.toml
                        └ algorithms.toml

The tables hold data only; a new model or data set is one row.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner.config.builtin import catalog_llava
from xtuner.errors import ConfigError

_TABLES = Path(__file__).parents[1] / "tables"
_DEFAULT_EPOCHS = 3
_ROW_KEYS = ("epochs", "aliases", "models", "note")
"""Keys of a data set's row that are not settings."""


def names(pattern: str = "") -> list[str]:
    """List the built-in names.

    Args:
        pattern: a part of the names, in any case, or a pattern with ``*`` and ``?``. Other names
            of a data set are found as well.
    """
    matches = _matcher(pattern.lower())
    image_model = [name for name in catalog_llava.names(_seeing_models()) if matches(name)]
    return image_model + [
        f"{model}_{recipe}_{data}_e{epochs}"
        for model, model_row in _models().items()
        for recipe in _recipes()
        for data, row in _data_sets().items()
        if row.get("models", model_row["kind"]) == model_row["kind"]
        for epochs in [row.get("epochs", _DEFAULT_EPOCHS)]
        if any(
            matches(f"{model}_{recipe}_{known_as}_e{epochs}")
            for known_as in (data, *row.get("aliases", ()))
        )
    ]


def is_name(name: str) -> bool:
    """Whether `name` is a built-in name, with any number of epochs."""
    return _split(name) is not None or catalog_llava.split(name, _seeing_models()) is not None


def compose(name: str, *, suffix: str = "") -> dict[str, Any]:
    """Return the settings that the built-in `name` stands for; what is absent has its default.

    Args:
        name: as `names` lists them, with any number of epochs.
        suffix: what the files have behind their names where the settings are copied into files;
            one stage of two finds the work dir of the other by it.

    Raises:
        ConfigError: there is no such name; the message has those closest to it.
    """
    if sees := catalog_llava.split(name, _seeing_models()):
        return catalog_llava.compose(sees, _of_model(sees.model), suffix=suffix)
    parts = _split(name)
    if parts is None:
        raise ConfigError(_unknown(name))
    model, recipe, data, epochs = parts
    model_row, data_row = _models()[model], _data_sets()[data]
    if data_row.get("models", model_row["kind"]) != model_row["kind"]:
        raise ConfigError(f"{name}: '{data}' is for base models, and {model} is a chat model")
    own = _of_model(model)
    return {
        **own,
        **_recipes()[recipe],
        **own,
        **{key: value for key, value in data_row.items() if key not in _ROW_KEYS},
        "max_epochs": epochs,
    }


def note(name: str) -> str:
    """What has to be done by hand before the built-in `name` can be trained; often nothing."""
    if sees := catalog_llava.split(name, _seeing_models()):
        return catalog_llava.note(sees)
    parts = _split(name)
    return _data_sets()[parts[2]].get("note", "") if parts else ""


def _of_model(model: str) -> dict[str, Any]:
    row = _models()[model]
    return {
        "pretrained_model_name_or_path": row["path"],
        **_table("models")["kinds"][row["kind"]],
        **{key: value for key, value in row.items() if key not in ("path", "kind", "images")},
    }


def _seeing_models() -> list[str]:
    """The chat models that LLaVA can hold."""
    rows = _models().items()
    return [name for name, row in rows if row["kind"] == "chat" and row.get("images", True)]


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((_TABLES / f"{name}.toml").read_text(encoding="utf-8"))


def _models() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = _table("models")["models"]
    return rows


def _recipes() -> dict[str, dict[str, Any]]:
    return _table("algorithms")


def _data_sets() -> dict[str, dict[str, Any]]:
    return _table("datasets")


@functools.cache
def _data_names() -> dict[str, str]:
    """The row of each data set by its names, the aliases included."""
    rows = _data_sets()
    aliases = {alias: name for name, row in rows.items() for alias in row.get("aliases", [])}
    return aliases | {name: name for name in rows}


def _split(name: str) -> tuple[str, str, str, int] | None:
    """Split `name` into model, recipe, data set and epochs; None where one of them is unknown."""
    match = re.fullmatch(r"(?P<rest>\w+)_e(?P<epochs>[1-9]\d{0,3})", name, flags=re.ASCII)
    if match is None:
        return None
    for recipe in _recipes():
        model, found, data = match["rest"].partition(f"_{recipe}_")
        if found and model in _models() and data in _data_names():
            return model, recipe, _data_names()[data], int(match["epochs"])
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
        f"{name}: there is no settings file and no built-in of that name{guess}\n"
        f"  Find one with `xtuner list-cfg -p {word}`; a name is made of a model, one of "
        f"{', '.join(_recipes())}, a data set, and e with the number of epochs"
    )


def _close_names(name: str) -> list[str]:
    """Built-in names like `name`, found part by part: there are too many to compare them whole."""
    if name.startswith("llava_"):
        return difflib.get_close_matches(name, catalog_llava.names(_seeing_models()), n=2)
    rest, _, epochs = name.rpartition("_e") if re.search(r"_e\d*$", name) else (name, "", "")
    for recipe in _recipes():
        model, found, data = rest.partition(f"_{recipe}_")
        if not found:
            continue
        close = [model] if model in _models() else difflib.get_close_matches(model, _models(), n=2)
        data_sets = difflib.get_close_matches(data, _data_names(), n=1, cutoff=0.5) or ["custom"]
        row = _data_names()[data_sets[0]]
        number = epochs.lstrip("0") or _data_sets()[row].get("epochs", _DEFAULT_EPOCHS)
        return [f"{model}_{recipe}_{row}_e{number}" for model in close]
    return [n for n in names() if n.startswith(f"{rest}_")][:2]
