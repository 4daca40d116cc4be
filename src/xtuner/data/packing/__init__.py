"""Mixing, ordering and packing of samples."""
