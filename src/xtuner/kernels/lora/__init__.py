"""Frozen linear layers and their LoRA adapters as one operation."""
