"""Read a settings file in Python syntax without executing it.

The text is parsed with `ast`, and only these are evaluated: assignments of literals, earlier names,
arithmetic, joined strings, f-strings, comparisons, conditionals, lists, tuples, dicts and their
items, and the few calls of `calls`. Anything else is reported as a problem with its line, so a
settings file from an untrusted source is only data. Size and work are bounded: ``10**10**9`` is a
problem, not a hang.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xtuner.config.read import arithmetic, calls, foreign, hints
from xtuner.config.read.arithmetic import RefusedError, kind
from xtuner.config.read.calls import Calls
from xtuner.config.read.entries import OVERRIDE, Entry, Problem, Reading
from xtuner.config.renames import advice
from xtuner.errors import did_you_mean

_MAX_WORK = 5_000_000
_MOST_PROBLEMS = 200
_READ_NOT_RUN = "a settings file is read, not executed; "
_NAME_FUNCTION = _READ_NOT_RUN + 'put your function in a file and name it as "my_file.py:function"'
_NO_IMPORT = (
    "take it out: a setting has the name of what it chooses, as in dataset_format = 'openai'"
)
_WRITE_OUT = _READ_NOT_RUN + "write the values out"
_HINTS: dict[type[ast.AST], str] = {
    ast.Import: _NAME_FUNCTION,
    ast.ImportFrom: _NAME_FUNCTION,
    ast.FunctionDef: _NAME_FUNCTION,
    ast.AsyncFunctionDef: _NAME_FUNCTION,
    ast.ClassDef: _NAME_FUNCTION,
    ast.Lambda: _NAME_FUNCTION,
    ast.Call: _READ_NOT_RUN + "write the value instead of the call",
    ast.Attribute: _READ_NOT_RUN + "write the value, or its name in quotes",
    ast.For: _WRITE_OUT,
    ast.While: _WRITE_OUT,
    ast.ListComp: _WRITE_OUT,
    ast.SetComp: _WRITE_OUT,
    ast.DictComp: _WRITE_OUT,
    ast.GeneratorExp: _WRITE_OUT,
    ast.AugAssign: "write it in full, as in lr = lr * 2",
    ast.Set: "write a list: [...]",
    ast.Starred: "write the items, or join lists with +",
}
_LOOKALIKES = {"true": "True", "false": "False", "none": "None", "null": "None"}


def read(text: str, *, overrides: Mapping[str, Any] | None = None) -> Reading:
    """Read the settings in `text`.

    Args:
        overrides: Values that replace what the file assigns to these names; values that the file
            computes from them change accordingly.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Reading(problems=[_syntax_problem(error, text)], parsed=False)
    reader = _Reader(text.split("\n"), overrides or {})
    reader.statements(tree.body)
    return reader.reading


class _Fault(Exception):
    def __init__(self, node: ast.AST, message: str) -> None:
        self.node = node
        self.message = message


class _Broken(Exception):
    """A name is used whose own problem is already listed."""


class _Reader:
    def __init__(self, lines: list[str], overrides: Mapping[str, Any]) -> None:
        self.reading = Reading()
        self._lines = lines
        self._overrides = overrides
        self._names: dict[str, Any] = {}
        self._work = 0
        self._calls = Calls()
        self._kinds: dict[type[ast.AST], Callable[[Any], Any]] = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.List: lambda node: self._items(node.elts),
            ast.Tuple: lambda node: tuple(self._items(node.elts)),
            ast.Dict: self._dict,
            ast.BinOp: lambda node: arithmetic.calculate(
                node.op, self._value(node.left), self._value(node.right)
            ),
            ast.UnaryOp: lambda node: arithmetic.unary(node.op, self._value(node.operand)),
            ast.BoolOp: self._bool,
            ast.Compare: self._compare,
            ast.IfExp: lambda node: self._value(
                node.body if self._value(node.test) else node.orelse
            ),
            ast.JoinedStr: lambda node: "".join(self._piece(part) for part in node.values),
            ast.Subscript: self._item,
            ast.Call: self._call,
        }

    def statements(self, body: list[ast.stmt]) -> None:
        """Read `body`, continuing after a fault."""
        for statement in body:
            if len(self.reading.problems) >= _MOST_PROBLEMS:
                return
            try:
                self._statement(statement)
            except _Fault as fault:
                self.note(fault.node, _name_of_old(statement) or fault.message)
                self._break(statement)
            except RecursionError:
                self.note(statement, "is nested too deeply")
                self._break(statement)
            except _Broken:
                self._break(statement)

    def note(self, node: ast.AST, message: str) -> None:
        """List a problem at the line of `node`."""
        line = getattr(node, "lineno", 1)
        self.reading.problems.append(Problem(self._lines[line - 1].strip(), message, line=line))

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                self._assign(node, targets, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(node, [target], value)
            case ast.If(test=test, body=body, orelse=orelse):
                self.statements(body if self._value(test) else orelse)
            case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.Expr(value=ast.Dict()):
                raise _Fault(node, "write name = value, one per line, without braces")
            case ast.AnnAssign(target=ast.Name(name), annotation=value):
                text = f"{name} = {ast.unparse(value)}"
                raise _Fault(node, f"write {text}; a file with  name: value  must end in .yaml")
            case ast.Expr(value=ast.Compare(left=ast.Name(name), ops=[ast.Eq()])):
                self.reading.broken.add(name)
                raise _Fault(node, "write one = to set a value")
            case ast.Expr(value=value):
                raise _Fault(node, _HINTS.get(type(value), "has no effect; write name = value"))
            case ast.Import() | ast.ImportFrom() if self._calls.take_import(node):
                pass
            case ast.Import() | ast.ImportFrom() if foreign.imports_foreign(node):
                raise _Fault(node, _NO_IMPORT)
            case _:
                raise _Fault(node, _HINTS.get(type(node), _READ_NOT_RUN + "write name = value"))

    def _assign(self, node: ast.stmt, targets: list[ast.expr], value: ast.expr) -> None:
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if len(names) < len(targets):
            raise _Fault(node, "assign to one name at a time, as in lr = 2e-4")
        all_overridden = all(name in self._overrides for name in names)
        given = None if all_overridden else self._value(value)
        for name in names:
            overridden = name in self._overrides
            self._names[name] = self._overrides[name] if overridden else given
            self.reading.broken.discard(name)
            if not name.startswith("_"):
                line = OVERRIDE if overridden else node.lineno
                self.reading.entries[name] = Entry(self._names[name], line)

    def _break(self, statement: ast.stmt) -> None:
        """Mark the names that `statement` should have set, so that neither their uses nor their
        absence are reported."""
        names = {*_stored(statement), *_written(statement)}
        self.reading.broken.update(names)
        for name in names:
            self.reading.entries.pop(name, None)

    def _value(self, node: ast.expr) -> Any:
        read_kind = self._kinds.get(type(node))
        if read_kind is None and isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            of_library = node.attr[:1].isupper() or text.startswith("torch.")
            name = node.attr if of_library else text
            raise _Fault(node, f"{_HINTS[ast.Attribute]}: {name!r}")
        if read_kind is None:
            raise _Fault(node, _HINTS.get(type(node), _READ_NOT_RUN + "write the value itself"))
        try:
            value = read_kind(node)
            self._work += arithmetic.check_size(value)
        except RefusedError as refused:
            raise _Fault(node, str(refused)) from None
        if self._work > _MAX_WORK:
            raise _Fault(node, "the file is too expensive to evaluate; write the values out")
        return value

    def _items(self, nodes: Sequence[ast.expr]) -> list[Any]:
        for node in nodes:
            self._refuse_adjacent(node)
        return [self._value(node) for node in nodes]

    def _refuse_adjacent(self, node: ast.expr) -> None:
        """Refuse two strings without a comma in a list, which Python joins."""
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if not text or node.end_lineno is None:
            return
        lines = [line.encode() for line in self._lines[node.lineno - 1 : node.end_lineno]]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        if hints.lacks_comma(b"\n".join(lines).decode()):
            raise _Fault(node, "two strings without a comma between them; write one, or +")

    def _constant(self, node: ast.Constant) -> Any:
        if node.value is None or isinstance(node.value, str | bool | int | float):
            return node.value
        raise _Fault(node, f"a setting cannot be {type(node.value).__name__}")

    def _name(self, node: ast.Name) -> Any:
        if node.id in self.reading.broken:
            raise _Broken
        if node.id in self._names:
            return self._names[node.id]
        if node.id in _LOOKALIKES:
            raise _Fault(node, f"write {_LOOKALIKES[node.id]}")
        guess = did_you_mean(node.id, list(self._names))
        raise _Fault(node, f"no earlier line sets {node.id}{guess or '; strings need quotes'}")

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        pairs = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                raise _Fault(node, "the keys of a dict must be string or number literals")
            self._refuse_adjacent(value)
            pairs[self._value(key)] = self._value(value)
        return pairs

    def _bool(self, node: ast.BoolOp) -> Any:
        stop_at = isinstance(node.op, ast.Or)
        value = None
        for part in node.values:
            value = self._value(part)
            if bool(value) == stop_at:
                break
        return value

    def _compare(self, node: ast.Compare) -> bool:
        left = self._value(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self._value(comparator)
            if not arithmetic.compare(op, left, right):
                return False
            left = right
        return True

    def _piece(self, node: ast.expr) -> str:
        """One part of an f-string."""
        if not isinstance(node, ast.FormattedValue):
            return str(self._value(node))
        value = self._value(node.value)
        spec = self._value(node.format_spec) if node.format_spec else ""
        return arithmetic.formatted(value, conversion=node.conversion, spec=spec)

    def _item(self, node: ast.Subscript) -> Any:
        container = self._value(node.value)
        if isinstance(node.slice, ast.Slice):
            bounds = (node.slice.lower, node.slice.upper, node.slice.step)
            index: Any = slice(*(None if b is None else self._value(b) for b in bounds))
        else:
            index = self._value(node.slice)
        try:
            return container[index]
        except (TypeError, IndexError, KeyError, ValueError):
            raise _Fault(node, f"{kind(container)} has no item {index!r}") from None

    def _call(self, node: ast.Call) -> Any:
        name = self._calls.name_of(node.func)
        if name is None or node.keywords:
            return self._join(node)
        return calls.call(name, [self._value(argument) for argument in node.args])

    def _join(self, node: ast.Call) -> str:
        """Read ``"separator".join(strings)``."""
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str(separator)), attr="join"),
                args=[strings],
                keywords=[],
            ):
                parts = self._value(strings)
                if isinstance(parts, list | tuple) and all(isinstance(p, str) for p in parts):
                    arithmetic.check_size([separator] * len(parts))
                    return separator.join(parts)
                raise _Fault(node, "join takes a list of strings")
        raise _Fault(node, _HINTS[ast.Call])


def _stored(statement: ast.AST) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _written(statement: ast.AST) -> Iterator[str]:
    """Names that `statement` sets as dict keys, keyword arguments, items or attributes."""
    for node in ast.walk(statement):
        match node:
            case ast.Dict(keys=keys):
                yield from (str(key.value) for key in keys if isinstance(key, ast.Constant))
            case ast.keyword(arg=str(name)) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Store()):
                yield name


def _name_of_old(statement: ast.stmt) -> str | None:
    """What to write instead of the name that `statement` sets, if other trainers have it."""
    match statement:
        case ast.Assign(targets=[ast.Name(name)]):
            return advice(name)
    return None


def _syntax_problem(error: Exception, text: str) -> Problem:
    if isinstance(error, SyntaxError):
        number, lines = error.lineno or 1, text.split("\n")
        line = lines[number - 1] if number <= len(lines) else error.text or ""
        hint = hints.python_hint(line, error.msg, "\n".join(lines[: number - 1]))
        reason = f"is not Python: {error.msg}{f'; {hint}' if hint else ''}"
        return Problem(line.strip(), reason, line=number)
    if isinstance(error, ValueError):
        return Problem("the file", f"is not Python: {error}")
    return Problem("the file", "is nested too deeply")
