"""Compiled kernels for CPUs. The folder is optional: without it torch does the same work."""
