"""The few calls that a settings file may contain, computed here and not executed.

``int``, ``float``, ``round``, ``len`` and ``str`` of values, and ``os.path.join`` of strings, as in
``max_length = int(2048 - (336 / 14)**2)``. The imports that ``os.path.join`` needs are read too.
"""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Callable
from typing import Any

from xtuner.config.read.arithmetic import RefusedError, kind

_JOIN = "os.path.join"
_MODULES = ("os", "os.path", _JOIN)


def joined(*parts: Any) -> str:
    """`os.path.join` of strings, always with forward slashes."""
    if not parts or not all(isinstance(part, str) for part in parts):
        raise RefusedError("os.path.join takes strings")
    return str(posixpath.join(*parts))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": round,
    "len": len,
    "str": str,
    _JOIN: joined,
}


class Calls:
    """Computes calls by the names that the file's imports give."""

    def __init__(self) -> None:
        self._imported: dict[str, str] = {}

    def take_import(self, node: ast.stmt) -> bool:
        """Note an import of ``os`` or of a part of it; False for any other."""
        match node:
            case ast.Import(names=names):
                found = {(a.asname or a.name.split(".")[0]): _bound(a) for a in names}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = {(a.asname or a.name): f"{module}.{a.name}" for a in names}
            case _:
                return False
        if not set(found.values()) <= {*_MODULES}:
            return False
        self._imported |= found
        return True

    def name_of(self, function: ast.expr) -> str | None:
        """The allowed function that `function` names, if it does."""
        parts: list[str] = []
        while isinstance(function, ast.Attribute):
            parts.insert(0, function.attr)
            function = function.value
        if not isinstance(function, ast.Name):
            return None
        head = self._imported.get(function.id, function.id)
        name = ".".join([head, *parts])
        return name if name in _FUNCTIONS else None


def call(name: str, arguments: list[Any]) -> Any:
    """Return ``name(*arguments)``.

    Raises:
        RefusedError: The arguments do not fit.
    """
    if name == "str" and any(not isinstance(a, str | int | float) for a in arguments):
        raise RefusedError("str takes a number or a string")
    try:
        return _FUNCTIONS[name](*arguments)
    except (TypeError, ValueError, OverflowError):
        kinds = ", ".join(map(kind, arguments)) or "nothing"
        raise RefusedError(f"{name} cannot take {kinds}") from None


def _bound(alias: ast.alias) -> str:
    return alias.name if alias.asname else alias.name.split(".")[0]
