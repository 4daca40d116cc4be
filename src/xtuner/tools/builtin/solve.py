"""Equations."""

from __future__ import annotations

import re

_ALLOWED = re.compile(r"[\w\s+\-*/^().,=]*")
_CALLED = re.compile(r"([A-Za-z_]\w*)\s*\(")
_FUNCTIONS = {"sqrt", "exp", "log", "sin", "cos", "tan"}


def solve(equation: str) -> str:
    """Solve an equation, or several separated by commas.

    Args:
        equation: The equation, such as x + 3 = 5 or x + y = 5, x - y = 1.
    """
    if not _ALLOWED.fullmatch(equation) or len(equation) > 300 or "__" in equation:
        raise ValueError("an equation has numbers, letters, + - * / ^ ( ) and =")
    if unknown := {*_CALLED.findall(equation)} - _FUNCTIONS:
        raise ValueError(f"there is no function {', '.join(sorted(unknown))}")
    import sympy
    from sympy.parsing.sympy_parser import (
        convert_xor,
        implicit_multiplication,
        parse_expr,
        standard_transformations,
    )

    rules = (*standard_transformations, convert_xor, implicit_multiplication)
    names = {name: getattr(sympy, name) for name in _FUNCTIONS}
    names |= {"Symbol": sympy.Symbol, "Integer": sympy.Integer, "Float": sympy.Float}
    names |= {"Rational": sympy.Rational}

    def side(text: str) -> sympy.Expr:
        # the text has no quotes, attribute access, or names other than functions and letters
        if re.search(r"[A-Za-z)]\s*\.|\.\s*[A-Za-z_]", text):
            raise ValueError("attributes are not allowed in an equation")
        return parse_expr(text, transformations=rules, global_dict=dict(names))

    sides = [part.split("=") for part in equation.split(",")]
    if any(len(pair) > 2 for pair in sides):
        raise ValueError("an equation must have exactly one =")
    equations = [side(pair[0]) - (side(pair[1]) if len(pair) == 2 else 0) for pair in sides]
    symbols = sorted({s for each in equations for s in each.free_symbols}, key=str)
    solutions = sympy.solve(equations, symbols, dict=True)
    if not solutions:
        return "no solution"
    return "; ".join(
        ", ".join(f"{name} = {value}" for name, value in solution.items()) for solution in solutions
    )


TOOL = solve
