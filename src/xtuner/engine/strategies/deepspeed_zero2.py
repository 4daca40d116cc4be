"""Gradients and optimizer state are sharded (DeepSpeed's ZeRO stage 2)."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
