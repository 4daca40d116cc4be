"""Evaluate expressions of a settings file, with bounds on the size of values.

Operands are the types that settings can have: strings, numbers, True, False, None, lists, tuples
and dicts. The bounds are far above any sensible setting and far below what takes noticeable time.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_SIZE = 100_000
"""Maximum characters and items in one value."""
_MAX_BITS = 1024
_MAX_WIDTH = 100
_TOO_LARGE = "is too large for a setting"
_CALCULATE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


class RefusedError(Exception):
    """A value cannot be computed; the message says why."""


def calculate(op: ast.operator, left: Any, right: Any) -> Any:
    """Return ``left op right``: arithmetic, or strings and lists joined or repeated.

    Raises:
        RefusedError: The operands cannot be combined, or the result would be too large.
    """
    numbers = _is_number(left) and _is_number(right)
    repeats = isinstance(op, ast.Mult) and isinstance(left, int) != isinstance(right, int)
    joins = isinstance(op, ast.Add) and type(left) is type(right)
    if type(op) not in _CALCULATE:
        raise RefusedError("only + - * / // % ** are supported")
    if not (numbers or repeats or joins):
        raise _mismatch(left, right)
    if numbers and isinstance(op, ast.Pow):
        _check_power(left, right)
    elif repeats and not numbers:
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        check_size(repeated, times=times)
    try:
        value = _CALCULATE[type(op)](left, right)
    except ZeroDivisionError:
        raise RefusedError("divides by zero") from None
    except OverflowError:
        raise RefusedError(_TOO_LARGE) from None
    except TypeError:
        raise _mismatch(left, right) from None
    if isinstance(value, complex):
        raise RefusedError("is not a real number")
    return value


def compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    """Return ``left op right`` for a comparison.

    Raises:
        RefusedError: The two cannot be compared.
    """
    try:
        return bool(_COMPARE[type(op)](left, right))
    except TypeError:
        raise _mismatch(left, right) from None


def unary(op: ast.unaryop, value: Any) -> Any:
    """Return ``-value``, ``+value`` or ``not value``.

    Raises:
        RefusedError: `op` is not defined for `value`.
    """
    if type(op) not in _UNARY or not (isinstance(op, ast.Not) or _is_number(value)):
        raise RefusedError(f"is not possible with {kind(value)}")
    return _UNARY[type(op)](value)


def formatted(value: Any, *, conversion: int, spec: str) -> str:
    """Format one value of an f-string.

    Raises:
        RefusedError: `spec` does not fit the value or requests a very wide string.
    """
    widths = [width.lstrip("0") for width in re.findall(r"\d+", spec)]  # leading zeros hide digits
    if any(len(width) > 9 or int(width or 0) > _MAX_WIDTH for width in widths):
        raise RefusedError(_TOO_LARGE)
    if conversion != -1:
        value = ascii(value) if conversion == ord("a") else f"{value!r}"
    try:
        return format(value, spec)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"cannot be formatted: {error}") from None


def check_size(value: Any, *, times: int = 1) -> int:
    """Return the number of characters and items in `value`.

    Raises:
        RefusedError: That number, multiplied by `times`, is above MAX_SIZE.
    """
    total = 0
    pending = [value]
    while pending and total <= MAX_SIZE:
        item = pending.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int) and item.bit_length() > _MAX_BITS:
            raise RefusedError(_TOO_LARGE)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
    if total * max(times, 1) > MAX_SIZE:
        raise RefusedError(_TOO_LARGE)
    return total


def kind(value: Any) -> str:
    """Describe the type of `value`."""
    if value is None or isinstance(value, bool):
        return str(value)
    words = {str: "a string", int: "a number", float: "a number", list: "a list", tuple: "a tuple"}
    return words.get(type(value), "a dict")


def _check_power(base: float, exponent: float) -> None:
    integers = isinstance(base, int) and isinstance(exponent, int)
    if integers and abs(exponent) * int(base).bit_length() > _MAX_BITS:
        raise RefusedError(_TOO_LARGE)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _mismatch(left: Any, right: Any) -> RefusedError:
    return RefusedError(f"cannot combine {kind(left)} and {kind(right)}")
