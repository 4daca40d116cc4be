"""The built-in settings."""
