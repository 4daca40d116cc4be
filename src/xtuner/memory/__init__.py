"""How much memory a run takes, estimated without loading a weight."""
