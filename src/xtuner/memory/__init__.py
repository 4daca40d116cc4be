"""Estimates the memory of a run without loading weights."""
