"""Fast layers, losses and attention, each checked against the plain formula before it is used."""
