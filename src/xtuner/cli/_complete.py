"""Names that the shell completes in arguments."""

from __future__ import annotations


def configs(incomplete: str) -> list[str]:
    """The built-in settings that begin with `incomplete`. Without a letter there are none, and the
    shell completes files."""
    from xtuner.config.builtin import catalog

    return [name for name in catalog.names() if name.startswith(incomplete)] if incomplete else []


def settings(incomplete: str) -> list[str]:
    """The settings that begin with `incomplete`."""
    from xtuner.config.schema import field_parts

    return [name for name in field_parts() if name.startswith(incomplete)]
