"""Tiny models and tokenizers for tests, ours and yours."""
