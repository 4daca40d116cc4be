"""The options of `xtuner chat` for tools, including those of XTuner 0.x."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from xtuner.errors import ConfigError

if TYPE_CHECKING:
    from xtuner.chat.session import Session, ToolUse
    from xtuner.chat.terminal import Terminal

Tools: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOOL",
        help="Let the model call tools: my_tools.py (functions with type hints and docstrings), "
        "calculator, clock, solve, python_interpreter, read_file:FOLDER, or 'mcp:COMMAND'; "
        "repeatable. Each call is shown, and runs only if you agree.",
    ),
]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", help="Run calls without asking.")]
MaxRounds: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Maximum number of answers with calls per question.")
]
ToolTimeout: TypeAlias = Annotated[
    float, typer.Option(min=0.1, help="Time limit for a call, in seconds.")
]
Lagent: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--lagent", help="As in XTuner 0.x: --tools python_interpreter --tools calculator."
    ),
]
WithPlugins: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="calculate|solve|search",
        help="As in XTuner 0.x: tools with the names of MOSS's plugins, Calculate and Solve.",
    ),
]

_PLUGINS = {"calculate": "Calculate=calculator", "solve": "Solve=solve"}
_NO_SEARCH = (
    "xtuner has no search service: write a function Search(query) in a file and pass it with "
    "--tools my_tools.py, or use an MCP server with --tools 'mcp:COMMAND'"
)


def names(
    tools: Sequence[str], *, lagent: bool = False, with_plugins: Sequence[str] = ()
) -> list[str]:
    """The tools that the options name, each once.

    Raises:
        ConfigError: A plugin is unknown, or only a search was asked for.
    """
    named = list(tools)
    if lagent:
        named += ["python_interpreter", "calculator"]
        typer.echo(f"Note: --lagent is --tools python_interpreter --tools calculator; {_NO_SEARCH}",
                   err=True)  # fmt: skip
    plugins = [plugin.lower() for plugin in with_plugins]
    if unknown := [p for p in plugins if p not in (*_PLUGINS, "search")]:
        raise ConfigError(
            f"--with-plugins {unknown[0]}: must be calculate, solve or search; other tools are "
            "passed with --tools"
        )
    named += [_PLUGINS[plugin] for plugin in plugins if plugin != "search"]
    if "search" in plugins:
        if not named:
            raise ConfigError(f"--with-plugins search: {_NO_SEARCH}")
        typer.echo(f"Note: --with-plugins search: {_NO_SEARCH}", err=True)
    return list(dict.fromkeys(named))


def check(tools: Sequence[str], *, yes: bool, can_ask: bool) -> None:
    """Reject, before the model is loaded, unknown tools and tools whose calls nobody can allow.

    Args:
        tools: Names of tools.
        yes: Calls run without asking.
        can_ask: Somebody can be asked before a call.

    Raises:
        ConfigError: A name is invalid, or calls must be allowed one by one, but the input is not a
            terminal; all problems are listed.
    """
    from xtuner.tools.toolbox import faults_of, refuse

    if not tools and yes:
        raise ConfigError("--yes has no effect without --tools")
    faults = faults_of(tools)
    if tools and not yes and not can_ask:
        faults.append(
            "asks before each call, but the input is not a terminal; add --yes to run calls "
            "without asking"
        )
    refuse(faults)


@contextmanager
def opened(
    session: Session,
    terminal: Terminal,
    tools: Sequence[str],
    *,
    yes: bool,
    max_rounds: int,
    timeout: float,
) -> Iterator[None]:
    """Give the session its tools inside the block.

    Raises:
        ConfigError: A tool cannot be loaded.
    """
    with tool_use(tools, max_rounds=max_rounds, timeout=timeout) as use:
        if use is not None:
            session.tools = replace(use, allow=lambda call: terminal.allow(call, always=yes))
            if terminal.interactive:
                typer.echo(f"Tools: {', '.join(use.box.names)}", err=True)
        yield


@contextmanager
def tool_use(tools: Sequence[str], *, max_rounds: int, timeout: float) -> Iterator[ToolUse | None]:
    """The tools of conversations inside the block; None if none are named.

    Raises:
        ConfigError: A tool cannot be loaded.
    """
    if not tools:
        yield None
        return
    from xtuner.chat.session import ToolUse
    from xtuner.tools.toolbox import open_tools

    with contextlib.closing(open_tools(tools, timeout=timeout)) as box:
        yield ToolUse(box, max_rounds=max_rounds)
