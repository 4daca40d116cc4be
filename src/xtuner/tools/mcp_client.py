"""The tools of an MCP server, which is started (``mcp:COMMAND``) or at an address.

The client runs in a thread with its own event loop. A server is a program that the user chooses to
run, with the user's permissions; xtuner limits only the time of its calls.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from xtuner.calls.read import read_tool
from xtuner.errors import ConfigError
from xtuner.tools.provider import Result

logger = logging.getLogger("xtuner.tools")


class McpTools:
    """The tools of the server at `server`: a command, or an address that begins with http.

    Raises:
        ConfigError: The package mcp is missing, or the server does not respond.
    """

    def __init__(self, server: str, *, timeout: float = 30.0) -> None:
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import Client, StdioServerParameters
        except ImportError as error:
            raise ConfigError(
                f"--tools mcp:{server}: needs the package mcp, version 2 or later: "
                "pip install 'xtuner[mcp]'"
            ) from error
        words = shlex.split(server)
        target: Any = server
        if not server.startswith(("http://", "https://")):
            target = StdioServerParameters(command=words[0], args=words[1:])
        self._stack = ExitStack()
        try:
            self._portal = self._stack.enter_context(start_blocking_portal())
            client = Client(target, read_timeout_seconds=timeout)
            self._client = self._stack.enter_context(
                self._portal.wrap_async_context_manager(client)
            )
            self.schemas: Sequence[Mapping[str, Any]] = self._portal.call(self._list)
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise ConfigError(f"--tools mcp:{server}: the server does not respond: "
                              f"{_innermost(error)}") from error  # fmt: skip

    async def _list(self) -> list[Mapping[str, Any]]:
        tools: list[Mapping[str, Any]] = []
        cursor = None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            for tool in page.tools:
                inner = {"name": tool.name, "description": tool.description or tool.title or ""}
                tools.append(read_tool({**inner, "parameters": tool.input_schema}))
            cursor = page.next_cursor
            if not cursor:
                return tools

    def call(self, name: str, arguments: Mapping[str, Any], *, timeout: float) -> Result:
        """See `Provider.call`."""

        async def ask() -> Any:
            return await self._client.call_tool(name, dict(arguments), read_timeout_seconds=timeout)

        try:
            found = self._portal.call(ask)
        except Exception as error:
            return Result(f"Error: {_innermost(error)}", failed=True)
        texts = [getattr(part, "text", f"({part.type})") for part in found.content]
        return Result("\n".join(texts) or "(no result)", failed=bool(found.is_error))

    def close(self) -> None:
        """See `Provider.close`."""
        try:
            self._stack.close()
        except Exception as error:  # the server has already exited
            logger.debug("closing an MCP server failed: %s", error)


def _innermost(error: BaseException) -> str:
    """The message of the innermost exception of a group."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
