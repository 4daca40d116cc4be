"""Checks of `xtuner serve` and `xtuner web`: packages and address."""

from __future__ import annotations

import importlib.util

import typer

from xtuner.errors import ConfigError, LaunchError


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        LaunchError: One is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)}: not installed; run: pip install 'xtuner[{extra}]'"
        )


def check_address(address: str, *, secret: str | None, flag: str) -> None:
    """Require a secret for addresses other than loopback, and warn about them.

    Raises:
        ConfigError: There is no secret.
    """
    from xtuner.serve.guard import is_loopback

    if is_loopback(address):
        return
    if not secret:
        raise ConfigError(
            f"--address {address}: everyone who can reach this machine could use the server. Add "
            f"{flag}, or omit --address and use an SSH tunnel"
        )
    typer.echo(
        f"Warning: at {address} everyone who can reach this machine and knows the secret can use "
        "the server. The secret is sent unencrypted: use a network that you trust, or a proxy with "
        "TLS.",
        err=True,
    )
