"""ZeRO stage 3 with weights and optimizer state in CPU memory."""

from xtuner.engine.strategies._deepspeed import built_in_strategy

Strategy = built_in_strategy(__name__)
