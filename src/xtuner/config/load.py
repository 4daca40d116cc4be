"""Load settings from a file or a built-in name, with overrides; check and freeze them.

    config.py | config.yaml | built-in name ──read──► entries ◄── --set ──check──► Settings

All problems are reported together, in one `ConfigError`, with their lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.builtin import catalog
from xtuner.config.check import check
from xtuner.config.read import foreign, python, yaml
from xtuner.config.read import overrides as override_reader
from xtuner.config.read.entries import (
    ARGUMENT,
    BUILT_IN,
    OVERRIDE,
    Entry,
    Problem,
    Reading,
    report,
)
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError, did_you_mean

_READERS = {".py": python.read, ".yaml": yaml.read, ".yml": yaml.read}
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class LoadedSettings:
    """Settings and where they came from.

    Attributes:
        name: The file name without its suffix, or the built-in name.
        folder: The folder of the file; the working directory for a built-in.
        path: The file; None for a built-in.
    """

    settings: Settings
    name: str
    folder: Path
    path: Path | None

    def work_dir(self, given: str | Path | None = None) -> Path:
        """The work dir of a run: `given`, otherwise the setting, otherwise ``work_dirs/NAME``."""
        folder = given or self.settings.work_dir or Path("work_dirs") / self.name
        return Path(folder).expanduser()


def load_settings(
    config: str | Path | Mapping[str, Any], *, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> LoadedSettings:
    """Load the settings file or the built-in settings called `config`, or a dictionary.

    Args:
        config: A .py, .yaml or .yml file, a name that `xtuner list-cfg` shows, or settings by name.
        overrides: Strings ``"name=value"``, or values by name, that override `config`.

    Raises:
        ConfigError: There is no such file or name, or it has problems; all are listed.
    """
    problems: list[Problem] = []
    if isinstance(overrides, Mapping):
        values, line = _plain(overrides), ARGUMENT
    else:
        (values, problems), line = override_reader.read(overrides), OVERRIDE
    path = None if isinstance(config, Mapping) else _file(config)
    if path is None:
        name = "settings" if isinstance(config, Mapping) else str(config)
        given = _plain(config) if isinstance(config, Mapping) else catalog.compose(name)
        reading = Reading({key: Entry(value, BUILT_IN) for key, value in given.items()})
    else:
        name = path.stem
        text = _text(path)
        if origin := foreign.origin(text, path.suffix):
            raise ConfigError(foreign.offer(str(config), origin))
        reading = _READERS[path.suffix.lower()](text, overrides=values)
    if not reading.parsed:
        raise ConfigError(report(str(path or name), reading.problems))
    for key, value in values.items():
        reading.entries[key] = Entry(value, line)
        reading.broken.discard(key)
    settings, found = check(reading)
    found = [*reading.problems, *found, *problems]
    if settings is None or found:
        raise ConfigError(report(str(path or name), found))
    folder = path.resolve().parent if path else Path.cwd()
    return LoadedSettings(settings, name, folder, path)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with paths as text, as a settings file has them."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {str(name): plain(value) for name, value in values.items()}


def _file(config: str | Path) -> Path | None:
    """The path of the settings file, or None for a built-in name."""
    try:
        return _named(config, Path(config).expanduser())
    except OSError as error:
        raise ConfigError(f"{config}: cannot be read: {error.strerror}") from None


def _named(config: str | Path, path: Path) -> Path | None:
    known_suffix = path.suffix.lower() in _READERS
    if path.is_dir() and not catalog.is_name(str(config)):
        raise ConfigError(f"{config}: is a folder; give the settings file in it")
    if path.is_file() and not known_suffix:
        raise ConfigError(
            f"{config}: a settings file must end in .py, .yaml or .yml; rename it to .py if its "
            "lines are  name = value , to .yaml if they are  name: value"
        )
    if path.is_file():
        return path
    if known_suffix:
        raise ConfigError(
            f"{config}: no such file (looked in {Path.cwd()})"
            + (
                did_you_mean(path.name, _settings_files(path.parent))
                or "; `xtuner copy-cfg NAME FOLDER` creates one"
            )
        )
    if catalog.is_name(str(config)):
        return None
    if same := [name for name in _settings_files(path.parent) if Path(name).stem == path.name]:
        raise ConfigError(f"{config}: is no built-in name; did you mean the file {same[0]}?")
    return None


def _settings_files(folder: Path) -> list[str]:
    """The names of the files in `folder` that may be settings; empty if it cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(file.name for file in folder.iterdir() if file.suffix in _READERS)
    return []


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: is too large for a settings file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} line {line}: is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
