"""Migrate a file: detect its format, read it, and write the settings file.

The format is detected from the content (`xtuner.config.read.foreign`), never from the name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from xtuner.config import renames
from xtuner.config.check import check
from xtuner.config.read import foreign
from xtuner.errors import ConfigError, listed, shell_command
from xtuner.migrate.report import Draft
from xtuner.migrate.values import UnreadError
from xtuner.migrate.xtuner import read as read_mmengine
from xtuner.migrate.xtuner import systems, xtuner_old
from xtuner.migrate.yaml_trainers import llamafactory, torchtune

_YAML = {foreign.LLAMA_FACTORY: llamafactory.migrate, foreign.TORCHTUNE: torchtune.migrate}

_FEW = 3
"""A file with this many names of another trainer is taken for its config."""


@dataclass(frozen=True)
class Migrated:
    """The result of a migration.

    Attributes:
        path: The settings file.
        draft: Its contents and the report.
    """

    path: Path
    draft: Draft


def read(path: Path) -> Draft:
    """Translate the config `path` to settings and check them against the schema.

    Raises:
        ConfigError: The file cannot be read, or its format is not supported.
    """
    text = read_mmengine.read_text(path)
    origin = foreign.origin(text, path.suffix)
    if origin is None:
        raise ConfigError(f"{path}: {_not_converted(path, text)}")
    try:
        draft = _translate(path, text, origin)
    except UnreadError as error:
        value = error.value
        raise ConfigError(f"{path}, line {value.line}: {value.text} {value.why}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"{path}: a value has a type that {origin} does not accept: {error}"
        ) from error
    if not draft.refused and not draft.not_yet:
        draft.values.setdefault("work_dir", f"./work_dirs/{path.stem}")
        _check(draft)
    return draft


def _not_converted(path: Path, text: str) -> str:
    """Why no config is recognized in `text`, and what to do."""
    known = f"only configs of {', '.join(foreign.ORIGINS)} are converted"
    imports = re.findall(r"^(?:from|import) (trl|unsloth|transformers|peft|torch)\b", text, re.M)
    if path.suffix == ".py" and imports:
        return (
            f"is a script (it imports {', '.join(sorted({*imports}))}), and {known}. Write its "
            f"values into a settings file, which `xtuner copy-cfg` creates; `xtuner explain NAME` "
            f"gives the name used here for a setting of another trainer"
        )
    names = re.findall(r"^([A-Za-z_]\w*) *[:=]", text, re.M)
    if sum(renames.advice(name) is not None for name in names) >= _FEW:
        return (
            f"has settings of another trainer, and {known}. "
            f"`{shell_command('xtuner', 'train', path)}` lists the name of each of them here"
        )
    return f"{known}; a settings file of this version needs no migration"


def _translate(path: Path, text: str, origin: str) -> Draft:
    if origin == foreign.XTUNER_OLD:
        return xtuner_old.migrate(read_mmengine.read(path), systems=systems.near(path))
    try:
        return _YAML[origin](text, path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check(draft: Draft) -> None:
    """Add the problems that the schema finds."""
    _, problems = check(draft.reading())
    draft.take_problems(problems)


def migrate(old: Path, new: Path | None = None) -> Migrated:
    """Write the settings file that is equivalent to `old`.

    Args:
        old: The config.
        new: The file to write; default: NAME_migrated.py in the working directory. An existing file
            is accepted if it has exactly the text that would be written.

    Raises:
        ConfigError: `old` cannot be read or translated faithfully, or `new` exists.
    """
    draft = read(old)
    new = Path(f"{old.stem}_migrated.py") if new is None else new
    if new.suffix != ".py":
        raise ConfigError(f"{new}: the name of the settings file must end in .py")
    if draft.refused or draft.not_yet:
        what = "cannot be migrated yet" if draft.not_yet else "cannot be migrated"
        raise ConfigError(listed(f"{old} ({draft.origin}) {what}:", list(draft.reasons())))
    _name_files(draft, new.stem)
    text = draft.text(source=old.name, command=shell_command("xtuner", "train", new))
    _write(new, text)
    for end, text in draft.files.items():
        _write(new.with_name(f"{new.stem}{end}"), text)
    return Migrated(new, draft)


def _name_files(draft: Draft, stem: str) -> None:
    """Insert the name of the new file into the settings that refer to accompanying files."""
    for end in draft.files:
        draft.note(0, f"{stem}{end}", "is written next to the settings file, which refers to it")
    formats = draft.values.get("dataset_format", ())
    draft.values["dataset_format"] = [name.replace("{stem}", stem) for name in formats]
    template = str(draft.values.get("prompt_template", "auto"))
    draft.values["prompt_template"] = template.replace("{stem}", stem)


def _write(path: Path, text: str) -> None:
    """Write `text` atomically; never overwrite a file with other text."""
    try:
        if path.exists():
            if path.read_text(encoding="utf-8") == text:
                return
            raise ConfigError(
                f"{path}: exists with different content; delete it or choose another name"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
