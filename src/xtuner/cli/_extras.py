"""What commands that serve have in common: their packages, and the address they listen on."""

from __future__ import annotations

import importlib.util

import typer

from xtuner.errors import ConfigError, LaunchError


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        LaunchError: one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)}: not installed; run: pip install 'xtuner[{extra}]'"
        )


def check_address(address: str, *, secret: str | None, flag: str) -> None:
    """Allow an address other than loopback only with a secret, and say what it opens.

    Raises:
        ConfigError: there is none.
    """
    from xtuner.serve.guard import is_loopback

    if is_loopback(address):
        return
    if not secret:
        raise ConfigError(
            f"--address {address}: everyone who can reach this machine could use it. Add {flag}, "
            "or leave the address out and use an SSH tunnel"
        )
    typer.echo(
        f"Warning: {address} opens the server to everyone who can reach this machine and knows the "
        "secret, which travels unencrypted: use it in a network that you trust, or behind a proxy "
        "with TLS.",
        err=True,
    )
