"""The modules that a user's Python file imports from its own folder.

They are found by parsing, without running anything, in the folder of the file and in the packages
inside it. What is imported by a name that is computed at run time is not found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def local_imports(file: Path) -> dict[str, Path]:
    """The modules in the folder of `file` that it imports, directly or through others of them: the
    path of each by its dotted name, such as 'helpers' and 'pack.words'. Packages count by their
    ``__init__.py``. Files that cannot be parsed are listed, but not followed; links that lead out
    of the folder are left out.
    """
    folder = file.parent.resolve()
    found: dict[str, Path] = {}
    waiting = [("", file.resolve())]
    while waiting:
        package, path = waiting.pop()
        for name in _imported(path, package):
            for module, target in _modules(folder, name):
                if module not in found and target != file.resolve():
                    found[module] = target
                    inside = target.name == "__init__.py"
                    waiting.append((module if inside else module.rpartition(".")[0], target))
    return dict(sorted(found.items()))


def sources(file: Path) -> list[Path]:
    """`file` and its `local_imports`."""
    return [file, *local_imports(file).values()]


def _imported(path: Path, package: str) -> Iterator[str]:
    """The dotted names that the file imports, and those that may be modules among them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level and package else []
            base = parts[: len(parts) - (node.level - 1)] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}".lstrip(".") for alias in node.names)


def _modules(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The files in `folder` that importing `name` runs, by module name: packages, then modules."""
    at, parts = folder, name.split(".")
    for index, part in enumerate(parts):
        if not part.isidentifier():
            return
        module = ".".join(parts[: index + 1])
        for candidate in (at / part / "__init__.py", at / f"{part}.py"):
            if candidate.is_file() and candidate.resolve().is_relative_to(folder):
                yield module, candidate.resolve()
                break
        at = at / part
