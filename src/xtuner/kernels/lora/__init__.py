"""A frozen linear layer and its LoRA adapter as one operation."""
