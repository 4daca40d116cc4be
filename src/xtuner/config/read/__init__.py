"""Read a settings file without executing it."""
