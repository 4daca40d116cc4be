"""Compiled CPU kernels. The folder is optional: without it torch does the same work."""
