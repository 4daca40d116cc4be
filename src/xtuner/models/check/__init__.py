"""Checks, with the loaded weights, that training computes what it should."""
