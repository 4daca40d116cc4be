"""Optimizer state is sharded across processes (DeepSpeed's ZeRO stage 1)."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
