"""Evaluate the expressions of a config without executing code.

Supported are literals, earlier names, arithmetic, string concatenation, f-strings without format
specs, comparisons, conditionals, subscripts, ``dict(...)``, ``int(...)`` and similar, and
``os.path.join`` of strings. Anything else becomes `Unread` with its line, its text and the reason.
Size and work are bounded.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xtuner.config.read import arithmetic
from xtuner.config.read.arithmetic import RefusedError
from xtuner.config.read.calls import joined
from xtuner.errors import ConfigError
from xtuner.migrate.values import Dotted, Table, Unread, copied

_MAX_WORK = 5_000_000
_REFUSAL = 20_000
"""Work charged for a value that is rejected as too large."""
_NUMBERS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": round,
    "len": len,
    "str": str,
    "abs": abs,
    "min": min,
    "max": max,
    "bool": bool,
}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple}


class Budget:
    """Limits the work of reading, over all files of a config."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.work = 0

    def spend(self, amount: int) -> None:
        """Add `amount`, in characters and items created.

        Raises:
            ConfigError: The limit is exceeded.
        """
        self.work += amount
        if self.work > _MAX_WORK:
            raise ConfigError(f"{self.files[0]}: the config computes too much to be evaluated")


class Expressions:
    """Evaluates expressions with the names defined so far.

    Args:
        budget: Limits the work.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._names = Table(1)
        self._kinds: dict[type[ast.AST], Callable[[Any], Any]] = {
            ast.Constant: self._constant,
            ast.Name: lambda node: self._names.get(node.id, self._unread(node, "is not defined")),
            ast.List: lambda node: [self._value(item) for item in node.elts],
            ast.Tuple: lambda node: tuple(self._value(item) for item in node.elts),
            ast.Dict: self._dict,
            ast.BinOp: self._binary,
            ast.UnaryOp: lambda node: self._made(
                node, [node.operand], lambda value: arithmetic.unary(node.op, value)
            ),
            ast.BoolOp: self._bool,
            ast.Compare: self._compare,
            ast.IfExp: self._choice,
            ast.JoinedStr: self._text,
            ast.Subscript: self._item,
            ast.Attribute: self._attribute,
            ast.Call: self._call,
        }

    def _value(self, node: ast.expr) -> Any:
        read_kind = self._kinds.get(type(node))
        if read_kind is None:
            return self._unread(node, f"is a {words(node)}, which is not executed")
        try:
            value = read_kind(node)
            self._budget.spend(arithmetic.check_size(value))
        except RefusedError as refused:
            self._budget.spend(_REFUSAL)
            return self._unread(node, str(refused))
        return value

    def _unread(self, node: ast.AST, why: str) -> Unread:
        text = ast.unparse(node)
        return Unread(
            getattr(node, "lineno", 1), text if len(text) < 60 else text[:57] + "...", why
        )

    def _made(self, node: ast.expr, parts: Sequence[ast.expr], make: Callable[..., Any]) -> Any:
        """Apply `make` to the values of `parts`; `Unread` if one of them is `Unread` or a name."""
        values = [self._value(part) for part in parts]
        for value in values:
            if isinstance(value, Unread):
                return value
            if isinstance(value, Dotted):
                return self._unread(node, f"computes with {value}")
        return make(*values)

    def _constant(self, node: ast.Constant) -> Any:
        if node.value is None or isinstance(node.value, str | bool | int | float):
            return node.value
        return self._unread(node, "is not a supported value")

    def _binary(self, node: ast.BinOp) -> Any:
        return self._made(
            node, [node.left, node.right], lambda a, b: arithmetic.calculate(node.op, a, b)
        )

    def _dict(self, node: ast.Dict) -> Any:
        table = Table(node.lineno)
        for key, value in zip(node.keys, node.values, strict=True):
            given = self._value(value)
            if key is None:
                self._take_over(table, given, node)
                continue
            name = self._value(key)
            if not isinstance(name, str | int | float | bool):
                return self._unread(node, "has a key that is not a string")
            table.put(str(name), given, key.lineno)
        return table

    def _take_over(self, table: Table, given: Any, node: ast.AST) -> None:
        if not isinstance(given, Table):
            raise RefusedError(f"** of {ast.unparse(node)[:40]} is not a dict")
        for key, item in given.items():
            table.put(key, item, given.line_of(key))

    def _bool(self, node: ast.BoolOp) -> Any:
        stop_at, value = isinstance(node.op, ast.Or), None
        for part in node.values:
            value = self._value(part)
            if isinstance(value, Unread) or bool(value) == stop_at:
                break
        return value

    def _compare(self, node: ast.Compare) -> Any:
        left = self._value(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self._value(comparator)
            for side in (left, right):
                if isinstance(side, Unread):
                    return side
            if not arithmetic.compare(op, left, right):
                return False
            left = right
        return True

    def _choice(self, node: ast.IfExp) -> Any:
        decides = self._value(node.test)
        if isinstance(decides, Unread):
            return decides
        return self._value(node.body if decides else node.orelse)

    def _text(self, node: ast.JoinedStr) -> Any:
        pieces = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue) and (part.format_spec or part.conversion != -1):
                return self._unread(node, "uses a format spec")
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            value = self._value(inner)
            if isinstance(value, Unread):
                return value
            if not isinstance(value, str | int | float | bool):
                return self._unread(node, "inserts a value that is neither a string nor a number")
            pieces.append(str(value))
        return "".join(pieces)

    def _item(self, node: ast.Subscript) -> Any:
        holder = self._value(node.value)
        if isinstance(node.slice, ast.Slice):
            bounds = (node.slice.lower, node.slice.upper, node.slice.step)
            index: Any = slice(*(None if b is None else self._value(b) for b in bounds))
        else:
            index = self._value(node.slice)
        if isinstance(holder, Unread):
            return holder
        try:
            return holder[index]
        except (TypeError, IndexError, KeyError, ValueError):
            return self._unread(node, "does not exist")

    def _attribute(self, node: ast.Attribute) -> Any:
        holder = self._value(node.value)
        if isinstance(holder, Dotted):
            return Dotted(f"{holder.path}.{node.attr}")
        if isinstance(holder, Table) and node.attr in holder:
            return holder[node.attr]
        return holder if isinstance(holder, Unread) else self._unread(node, "does not exist")

    def _call(self, node: ast.Call) -> Any:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function == "dict":
            return self._made_dict(node)
        if function in _NUMBERS and not node.keywords:
            return self._made(node, node.args, lambda *given: _plain(_NUMBERS[function], given))
        if function in _CONTAINERS and len(node.args) == 1 and not node.keywords:
            return self._made(node, node.args, lambda one: _plain(_CONTAINERS[function], (one,)))
        called = self._value(node.func) if isinstance(node.func, ast.Attribute) else None
        name = called.path if isinstance(called, Dotted) else ""
        if name in ("os.path.join", "posixpath.join") and not node.keywords:
            return self._made(node, node.args, joined)
        if name in ("copy.deepcopy", "copy.copy") and len(node.args) == 1:
            return copied(self._value(node.args[0]))
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("copy", "join"):
            return self._own_method(node, node.func)
        return self._unread(node, "is a call, which is not executed")

    def _own_method(self, node: ast.Call, func: ast.Attribute) -> Any:
        holder = self._value(func.value)
        if func.attr == "copy" and isinstance(holder, Table | list) and not node.args:
            return copied(holder)
        if func.attr == "join" and isinstance(holder, str) and len(node.args) == 1:
            texts = self._value(node.args[0])
            if isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts):
                arithmetic.check_size([holder] * len(texts))
                return str(holder.join(texts))
        return self._unread(node, "is a call, which is not executed")

    def _made_dict(self, node: ast.Call) -> Any:
        table = Table(node.lineno)
        for argument in node.args:
            self._take_over(table, self._value(argument), node)
        for keyword in node.keywords:
            value = self._value(keyword.value)
            if keyword.arg is None:
                self._take_over(table, value, node)
            else:
                table.put(keyword.arg, value, keyword.lineno)
        return table


def _plain(function: Callable[..., Any], given: Sequence[Any]) -> Any:
    for value in given:
        arithmetic.check_size(value)
    try:
        return function(*given)
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(str(error)) from None


def words(node: ast.AST) -> str:
    """The kind of a statement or expression, for messages."""
    names = {
        ast.FunctionDef: "function definition",
        ast.ClassDef: "class definition",
        ast.For: "loop",
        ast.While: "loop",
        ast.ListComp: "list comprehension",
        ast.DictComp: "dict comprehension",
        ast.Lambda: "lambda",
        ast.Try: "try statement",
    }
    return names.get(type(node), type(node).__name__)
