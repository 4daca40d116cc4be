"""Python code, in a process of its own; see `xtuner.tools.sandbox`."""

from __future__ import annotations

from xtuner.tools.sandbox import run_code


def python_interpreter(code: str) -> str:
    """Run Python code and return what it prints, and the value of its last line.

    Args:
        code: The code. It has the standard library, and no network or files.
    """
    return run_code(code)


TOOL = python_interpreter
