"""A training run, from settings to checkpoints."""
