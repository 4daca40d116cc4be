"""Find the files that a config of mmengine is based on; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.errors import ConfigError


def module_path(module: str, level: int, config: Path, line: int) -> Path:
    """The file that ``from <dots><module> import *`` in `config` names.

    Args:
        module: the dotted name, without leading dots.
        level: number of leading dots; 0 is an absolute name, which is looked up in the package that
            `config` lies in.

    Raises:
        ConfigError: there is no such file.
    """
    parts = module.split(".") if module else []
    if level:
        folder = config.resolve().parent
        for _ in range(level - 1):
            folder = folder.parent
        roots = [folder]
    else:
        roots = list(config.resolve().parents)
        roots.append(Path.cwd())
    for root in roots:
        path = root.joinpath(*parts).with_suffix(".py") if parts else root / "__init__.py"
        if path.is_file():
            return path
    name = "." * level + module
    raise ConfigError(
        f"{config}, line {line}: the base {name!r} is not there (looked from {roots[0]}). Put the "
        "file where the config expects it"
    )


def base_paths(value: Any, config: Path) -> Iterator[Path]:
    """The files that ``_base_ = ...`` names, the last of them below the others.

    Raises:
        ConfigError: one is missing, or names a package.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
        raise ConfigError(f"{config}: _base_ is no text and no list of texts")
    for entry in reversed(entries):
        package, found, inside = entry.partition("::")
        path = config.resolve().parent / (inside if found else entry)
        if found:
            places = [folder / package / inside for folder in config.resolve().parents]
            path = next((place for place in places if place.is_file()), places[0])
        if not path.is_file():
            raise ConfigError(
                f"{config}: _base_ names {entry!r}, and there is no such file (looked for {path})"
            )
        yield path
