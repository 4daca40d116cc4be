"""Listen on an address, and stop in order."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from xtuner.errors import LaunchError


def bind(address: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        LaunchError: The address or port cannot be used.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"cannot listen on {address}:{port}: {error.strerror}. Choose another port with --port"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The address that a client uses, such as ``http://127.0.0.1:23333``."""
    name, port = listener.getsockname()[:2]
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def server(app: Any, *, shutdown_seconds: int = 3) -> Any:
    """uvicorn's server for `app`; `server(app).run([socket])` serves until it is stopped."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=shutdown_seconds,
        proxy_headers=False,
    )
    return uvicorn.Server(config)


def run(app: Any, listener: socket.socket, *, on_end: Callable[[], None]) -> None:
    """Serve `app` until Ctrl-C or SIGTERM; call `on_end` afterwards."""
    try:
        server(app).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after it has stopped
        pass
    finally:
        on_end()
