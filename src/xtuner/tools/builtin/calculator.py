"""Arithmetic."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_MOST_BITS = 20_000
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in (
        "sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan",
        "atan2", "sinh", "cosh", "tanh", "floor", "ceil", "degrees", "radians", "hypot", "gcd",
    )
} | {"abs": abs, "round": round, "min": min, "max": max}  # fmt: skip
_SIGNS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "，": ",", "（": "(", "）": ")"}
)


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: The expression, such as (3 + 4) * 2.
    """
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r:.80} is not an arithmetic expression") from error
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _BINARY[type(sign)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
        case ast.Call(func=ast.Name(id="factorial"), args=[argument], keywords=[]):
            number = _value(argument)
            if number > 1000:
                raise ValueError("factorial: at most 1000")
            return math.factorial(number)
    raise ValueError(f"{ast.unparse(node)!r:.60} is not arithmetic")


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > _MOST_BITS:
            raise ValueError("the result has too many digits")
        return base**exponent
    return float(base) ** exponent


TOOL = calculator
