"""Rows to token ids and loss masks, kept on disk."""
