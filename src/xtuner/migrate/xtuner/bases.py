"""Find the base files of an mmengine config; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.errors import ConfigError


def module_path(module: str, level: int, config: Path, line: int) -> Path:
    """The file that ``from <dots><module> import *`` in `config` names.

    Args:
        module: The dotted name, without leading dots.
        level: Number of leading dots; 0 is an absolute name, which is searched in the package that
            contains `config`.

    Raises:
        ConfigError: The file does not exist.
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
        f"{config}, line {line}: base config {name!r} not found (searched from {roots[0]}); put "
        "the file where the config expects it"
    )


def base_paths(value: Any, config: Path) -> Iterator[Path]:
    """The files in ``_base_ = ...``, last first.

    Raises:
        ConfigError: A file is missing, or ``_base_`` is not a string or a list of strings.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
        raise ConfigError(f"{config}: _base_ must be a string or a list of strings")
    for entry in reversed(entries):
        package, found, inside = entry.partition("::")
        path = config.resolve().parent / (inside if found else entry)
        if found:
            candidates = [folder / package / inside for folder in config.resolve().parents]
            path = next((path for path in candidates if path.is_file()), candidates[0])
        if not path.is_file():
            raise ConfigError(f"{config}: _base_ file {entry!r} not found (searched for {path})")
        yield path
