"""ZeRO stage 2 with the optimizer and its state on the CPU."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
