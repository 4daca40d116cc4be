"""The tools of a conversation: where they come from, and how they are called.

A tool is named as

    my_tools.py            every public function that the file defines
    my_tools.py:function   one of them
    calculator             a tool of `xtuner.tools.builtin`
    read_file:FOLDER       a built-in tool with its argument
    Calculate=calculator   a tool under another name
    mcp:COMMAND ARGUMENTS  the tools of an MCP server that is started, or at mcp:https://...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.calls.read import arguments_of, name_of
from xtuner.calls.schema import problems
from xtuner.errors import ConfigError, did_you_mean, listed
from xtuner.tools.provider import ALIAS, BUILTIN, Provider, Result

MOST_CHARACTERS = 20_000
"""Maximum length of a result that the model gets."""


class ToolBox:
    """The tools of all providers.

    Args:
        providers: The providers, whose tools have different names.
        timeout: Seconds that a call may take.

    Raises:
        ConfigError: Two tools have the same name, or there are no tools.
    """

    def __init__(self, providers: Sequence[Provider], *, timeout: float = 30.0) -> None:
        self._providers, self._timeout = tuple(providers), timeout
        self._by_name: dict[str, tuple[Provider, Mapping[str, Any]]] = {}
        for provider in providers:
            for schema in provider.schemas:
                name = name_of(schema)
                if name in self._by_name:
                    raise ConfigError(f"--tools: two tools are named {name!r}; remove one")
                self._by_name[name] = (provider, schema)
        if not self._by_name:
            raise ConfigError("--tools: no tool was found")

    @property
    def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """The tools in the form that the model gets."""
        return tuple(schema for _, schema in self._by_name.values())

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return list(self._by_name)

    def call(self, call: Mapping[str, Any]) -> Result:
        """Run a call; if it is wrong, the result describes the problem."""
        name, arguments = name_of(call), arguments_of(call)
        if name not in self._by_name:
            guess = did_you_mean(name, self.names)
            return _error(f"there is no tool {name!r}{guess}; there are {', '.join(self.names)}")
        provider, schema = self._by_name[name]
        if not isinstance(arguments, Mapping):
            return _error("the arguments must be a JSON object")
        if wrong := list(problems(arguments, schema["function"].get("parameters") or {})):
            return _error(f"wrong arguments: {'; '.join(wrong)}")
        result = provider.call(name, arguments, timeout=self._timeout)
        if len(result.text) > MOST_CHARACTERS:
            cut = f"{result.text[:MOST_CHARACTERS]}\n(cut after {MOST_CHARACTERS:,} characters)"
            return Result(cut, result.failed)
        return result

    def close(self) -> None:
        """Close all providers."""
        for provider in self._providers:
            provider.close()


def _error(text: str) -> Result:
    return Result(f"Error: {text}", failed=True)


def open_tools(names: Sequence[str], *, timeout: float = 30.0) -> ToolBox:
    """Open the tools with these names; see the module docstring.

    Raises:
        ConfigError: A name is invalid, or a tool cannot be loaded; all problems are listed.
    """
    refuse(faults_of(names))
    local = [name for name in names if not name.startswith("mcp:")]
    providers: list[Provider] = []
    try:
        if local:
            from xtuner.tools.host import LocalTools

            providers.append(LocalTools(local))
        for name in names:
            if name.startswith("mcp:"):
                from xtuner.tools.mcp_client import McpTools

                providers.append(McpTools(name.removeprefix("mcp:").strip(), timeout=timeout))
        return ToolBox(providers, timeout=timeout)
    except BaseException:
        for provider in providers:
            provider.close()
        raise


def builtin_names() -> list[str]:
    """Names of the built-in tools."""
    return plugins.names(BUILTIN)


def faults_of(names: Sequence[str]) -> list[str]:
    """The problems of names that can be detected without loading the tools."""
    return [fault for name in names for fault in _faults(name)]


def refuse(faults: Sequence[str]) -> None:
    """Raise ConfigError if there are `faults` of the option --tools."""
    if faults:
        raise ConfigError(listed("--tools:", faults) if len(faults) > 1 else f"--tools {faults[0]}")


def _faults(name: str) -> Iterator[str]:
    """The problem with a name that can be detected without loading the tool."""
    name = ALIAS.sub("", name)
    head, _, setting = name.partition(":")
    if head == "mcp":
        if not setting.strip():
            yield "mcp: needs a command or an address, such as 'mcp:npx my-server'"
        return
    file = Path(name.rpartition(":")[0] if plugins.is_user_path(name) else name).expanduser()
    if file.suffix == ".py":
        if not file.is_file():
            yield f"{name}: there is no file {file}"
        return
    if head not in builtin_names():
        guess = did_you_mean(head, builtin_names())
        yield (
            f"{name}: must be a file such as my_tools.py, mcp:COMMAND, or one of "
            f"{', '.join(builtin_names())}{guess}"
        )
    elif head == "read_file":
        if not setting:
            yield "read_file: needs the folder to share: read_file:FOLDER"
        elif not Path(setting).expanduser().is_dir():
            yield f"{name}: there is no folder {setting}"
    elif setting:
        yield f"{name}: takes no setting"
