"""Tiny models, tokenizers and devices for tests of xtuner and of your own extensions."""
