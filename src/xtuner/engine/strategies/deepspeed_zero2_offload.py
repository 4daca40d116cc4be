"""Stage 2 with the optimizer state in the CPU's memory, where it steps."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
