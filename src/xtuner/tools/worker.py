"""The process that holds Python tools and runs them: ``python -m xtuner.tools.worker NAME...``.

It reads one call per line from standard input and writes one answer per line to the original
standard output; what the tools print goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.errors import ConfigError, XTunerError
from xtuner.tools.function import schema_of
from xtuner.tools.provider import ALIAS, BUILTIN, as_text

Tools = dict[str, Callable[..., Any]]


def load(names: list[str]) -> tuple[Tools, list[dict[str, Any]]]:
    """The functions by name, and their schemas.

    Raises:
        ConfigError: A file cannot be imported, or a function cannot be used as a tool.
    """
    tools: Tools = {}
    schemas = []
    for name in names:
        for called, function in _functions(name):
            if called in tools:
                raise ConfigError(f"two tools are named {called!r}; remove one")
            tools[called] = function
            schemas.append(schema_of(function, name=called))
    return tools, schemas


def _functions(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    alias = ALIAS.match(name)
    name = ALIAS.sub("", name)
    head, _, setting = name.partition(":")
    if plugins.is_user_path(name) or name.endswith(".py"):
        yield from _of_file(name)
        return
    module = importlib.import_module(f"{BUILTIN}.{head}")
    yield alias[1] if alias else head, module.limited_to(setting) if setting else module.TOOL


def _of_file(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    file, _, wanted = name.rpartition(":") if plugins.is_user_path(name) else (name, "", "")
    path = Path(file).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise ConfigError(f"{path}: cannot be imported: {_where(error)}") from error
    public = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == path.stem and not key.startswith("_")
    }
    if wanted and wanted not in public:
        raise ConfigError(f"{path}: does not define the function {wanted!r}; it defines "
                          f"{', '.join(public) or 'none'}")  # fmt: skip
    if not public:
        raise ConfigError(f"{path}: defines no public function")
    yield from public.items() if not wanted else [(wanted, public[wanted])]


def _where(error: BaseException) -> str:
    """An exception with the innermost line of the user's code."""
    described = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}, line {frame.lineno}" for frame in frames]
    outside = [line for line in lines if "xtuner/tools/" not in line and "importlib" not in line]
    return f"{described} ({outside[-1]})" if outside else described


def answer(tools: Tools, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one call; an exception becomes an answer."""
    try:
        value = tools[request["name"]](**request["arguments"])
        if inspect.iscoroutine(value):
            import asyncio

            value = asyncio.run(value)
        return {"text": as_text(value), "failed": False}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"text": f"Error: {_where(error)}", "failed": True}


def main(names: list[str]) -> int:
    """Load the tools, list them, and answer calls until the input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what a tool prints must not be taken for an answer

        def say(value: Any) -> None:
            out.write(json.dumps(value) + "\n")
            out.flush()

        try:
            tools, schemas = load(names)
        except XTunerError as error:
            say({"error": str(error)})
            return 2
        say({"tools": schemas})
        with contextlib.suppress(KeyboardInterrupt):
            for line in sys.stdin:
                say(answer(tools, json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
