"""Python code in a separate process; see `xtuner.tools.sandbox`."""

from __future__ import annotations

from xtuner.tools.sandbox import run_code


def python_interpreter(code: str) -> str:
    """Run Python code; return its output and the value of its last line.

    Args:
        code: The code. It can use the standard library, but no network or files.
    """
    return run_code(code)


TOOL = python_interpreter
