"""Settings: schema, readers, checks, and the built-in settings."""
