"""Talk to a model: generate answers, keep the history, read from a terminal."""
