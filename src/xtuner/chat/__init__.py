"""Chat with a model: open it, keep the conversation, read from a terminal."""
