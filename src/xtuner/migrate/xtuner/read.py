"""Read an mmengine config (XTuner 0.1 and 0.2) without executing it.

    text ──ast──► statements ──► Table of names: numbers, strings, lists, tables, dotted names

Imports bind dotted names but import nothing. ``with read_base()`` and ``_base_`` read the base
files in the same way. What is known only after executing the file becomes `Unread`, as do values
computed from it. Size and work are bounded as in a settings file.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xtuner.errors import ConfigError
from xtuner.migrate.expressions import Budget, Expressions, words
from xtuner.migrate.values import Dotted, Table, Unread, copied
from xtuner.migrate.xtuner.bases import base_paths, module_path

_MAX_BYTES = 1_000_000
_MAX_FILES = 64


def read(path: Path, *, budget: Budget | None = None) -> Table:
    """Read the config `path` and its base files.

    Returns:
        The names that the file sets or imports, with their lines. Values that could not be read are
        `Unread`.

    Raises:
        ConfigError: A file is missing, too large, not valid Python, or computes too much.
    """
    budget = budget or Budget()
    if path.resolve() in budget.files or len(budget.files) >= _MAX_FILES:
        raise ConfigError(f"{path}: has itself as base, or more than {_MAX_FILES} base files")
    budget.files.append(path.resolve())
    text = read_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ConfigError(f"{path}{where}: is not valid Python: {error}") from None
    reader = _Reader(path, budget)
    try:
        reader.statements(tree.body)
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    finally:
        budget.files.pop() if len(budget.files) > 1 else None
    return reader.finished()


def read_text(path: Path) -> str:
    """The text of a config.

    Raises:
        ConfigError: It is missing, too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is too large for a config ({_MAX_BYTES:,} bytes at most)")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _Reader(Expressions):
    def __init__(self, path: Path, budget: Budget) -> None:
        super().__init__(budget)
        self._path = path
        self._imported: set[str] = set()

    def finished(self) -> Table:
        """The names, merged into those of ``_base_``."""
        below = self._names.pop("_base_", None)
        result = self._names
        for name in self._imported:
            value = result.get(name)
            if isinstance(value, Dotted):
                del result[name]
        if below is None:
            return result
        for base in base_paths(below, self._path):
            result = read(base, budget=self._budget).merged(result)
        return result

    def statements(self, body: Sequence[ast.stmt]) -> None:
        """Evaluate the statements of `body`."""
        for node in body:
            self._statement(node)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                given = self._value(value)
                for target in targets:
                    self._store(target, given)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._store(target, self._value(value))
            case ast.AugAssign(target=target, op=op, value=value):
                read_target = ast.parse(ast.unparse(target), mode="eval").body
                ast.copy_location(read_target, node)
                combined = ast.BinOp(left=read_target, op=op, right=value)
                self._store(target, self._value(ast.copy_location(combined, node)))
            case ast.Import(names=aliases):
                for alias in aliases:
                    bound = alias.asname or alias.name.split(".")[0]
                    self._bind(bound, alias.name if alias.asname else bound, node.lineno)
            case ast.ImportFrom():
                self._import(node)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name("read_base")))]):
                for inner in node.body:
                    self._read_base(inner)
            case ast.If(test=test, body=body, orelse=orelse):
                self._if(node, test, body, orelse)
            case ast.Expr(value=ast.Call() as call):
                self._method(call)
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Expr() | ast.Pass() | ast.Assert():
                pass
            case _:
                why = f"is set by a {words(node)}, which is not executed"
                for name in _stored(node):
                    self._names.put(name, Unread(node.lineno, name, why), node.lineno)

    def _bind(self, name: str, path: str, line: int) -> None:
        self._names.put(name, Dotted(path), line)
        self._imported.add(name)

    def _import(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name != "*":
                path = f"{node.module or ''}.{alias.name}".lstrip(".")
                self._bind(alias.asname or alias.name, path, node.lineno)

    def _read_base(self, node: ast.stmt) -> None:
        """Import the names of a base file: ``from .base import *``."""
        if not isinstance(node, ast.ImportFrom):
            return
        base = module_path(node.module or "", node.level, self._path, node.lineno)
        names = read(base, budget=self._budget)
        for alias in node.names:
            taken = (
                [name for name in names if not name.startswith("_")]
                if alias.name == "*"
                else [alias.name]
            )
            for name in taken:
                if name not in names:
                    where = f"{self._path}, line {node.lineno}"
                    raise ConfigError(f"{where}: {base} does not define {name}")
                bound = alias.asname or name
                self._names.put(bound, copied(names[name]), node.lineno)

    def _if(
        self, node: ast.If, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]
    ) -> None:
        decides = self._value(test)
        if isinstance(decides, Unread):
            for name in _stored(node):
                self._names.put(name, decides, node.lineno)
            return
        self.statements(body if decides else orelse)

    def _store(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self._names.put(name, value, target.lineno)
                self._imported.discard(name)
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                parts = value if isinstance(value, list | tuple) else []
                for number, item in enumerate(elts):
                    fits = len(parts) == len(elts)
                    part = (
                        parts[number] if fits else self._unread(target, "does not match its names")
                    )
                    self._store(item, part)
            case ast.Attribute() | ast.Subscript():
                holder, key = self._holder_and_key(target)
                value = copied(value)  # a config may put a table into itself
                if isinstance(holder, Table) and isinstance(key, str):
                    holder.put(key, value, target.lineno)
                elif (
                    isinstance(holder, list)
                    and isinstance(key, int)
                    and -len(holder) <= key < len(holder)
                ):
                    holder[key] = value
                else:
                    self._spoil(target)

    def _holder_and_key(self, target: ast.Attribute | ast.Subscript) -> tuple[Any, Any]:
        if isinstance(target, ast.Attribute):
            return self._value(target.value), target.attr
        return self._value(target.value), self._value(target.slice)

    def _delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._names.pop(target.id, None)
        elif isinstance(target, ast.Attribute | ast.Subscript):
            holder, key = self._holder_and_key(target)
            if isinstance(holder, Table) and isinstance(key, str):
                holder.pop(key, None)
            else:
                self._spoil(target)

    def _spoil(self, target: ast.AST) -> None:
        """Mark the variable of `target` as `Unread`, because a part of it could not be set."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and node.id in self._names:
                line = getattr(target, "lineno", 1)
                why = "is changed in a way that is known only after executing the file"
                self._names.put(node.id, Unread(line, ast.unparse(target), why), line)

    def _method(self, call: ast.Call) -> None:
        """Apply a call that changes a table or a list, such as ``model.update(...)``."""
        if not isinstance(call.func, ast.Attribute):
            return
        holder = self._value(call.func.value)
        given = [copied(self._value(argument)) for argument in call.args]
        match holder, call.func.attr, given:
            case Table(), "update" | "merge" | "_merge_a_into_b", [Table() as changes]:
                source = changes
                if call.func.attr == "merge":
                    source = holder.merged(changes)
                for key, value in source.items():
                    holder.put(key, value, source.line_of(key))
            case Table(), "update", []:
                for keyword in call.keywords:
                    if keyword.arg:
                        holder.put(keyword.arg, self._value(keyword.value), call.lineno)
            case Table(), "pop", [str() as key, *_]:
                holder.pop(key, None)
            case list(), "append", [item]:
                holder.append(item)
            case list(), "extend", [list() | tuple() as items]:
                holder.extend(items)
            case ((Table() | list()), _, _):
                self._spoil(call.func)


def _stored(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
