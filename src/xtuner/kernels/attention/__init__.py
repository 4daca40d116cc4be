"""Attention over packed samples: one dispatch, a kernel per kind of hardware."""
