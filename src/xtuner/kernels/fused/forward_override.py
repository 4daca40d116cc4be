"""Replace the forward pass of a layer by a subclass."""

from __future__ import annotations

from functools import cache


@cache
def with_forward(ours: type, layer: type) -> type:
    """A subclass of `layer` with the same name and the forward pass of `ours`."""
    return type(layer.__name__, (ours, layer), {"__module__": layer.__module__})
