"""Where models come from: the hub, GGUF files, files of weights."""
