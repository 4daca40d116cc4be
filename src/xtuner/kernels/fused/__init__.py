"""Faster replacements of model layers that give the same results."""
