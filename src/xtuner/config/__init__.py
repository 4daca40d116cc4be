"""Settings: their schema, how they are read and checked, and the built-in ones."""
