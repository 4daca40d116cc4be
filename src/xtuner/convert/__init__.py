"""Turn checkpoints into models that other tools read."""
