"""Sources of models: the hub, GGUF files, weight files."""
