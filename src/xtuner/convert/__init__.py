"""Convert checkpoints to models for other tools."""
