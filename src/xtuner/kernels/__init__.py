"""Fast layers, losses and attention, each checked against a reference implementation before use."""
