"""Encode rows to token ids and loss masks, cached on disk."""
