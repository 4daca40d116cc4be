"""Image input: vision tower, projector, LLaVA."""
