"""Optimizer state is divided among the processes (DeepSpeed's ZeRO stage 1)."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
