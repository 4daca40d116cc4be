"""The parts of `gpu_check.py` in order, the most informative first.

Does not import torch, because the parent process imports it; the worker looks up functions by name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: Name of the part.
        function: 'module:function' in this package; a generator of rows (`rows.Row`).
        kind: 'fact' and 'speed' are informative; for 'correctness' every row must pass.
        seconds: Estimated time on a Hopper GPU; with less time left the part is not started.
        limit: Seconds after which it is stopped.
    """

    name: str
    function: str
    kind: str
    seconds: float
    limit: float


PARTS = (
    Part("machine", "machine:machine", "fact", 5, 90),
    Part("gradients", "correct:gradients", "correctness", 10, 90),
    Part("isolation", "correct:isolation", "correctness", 5, 40),
    Part("dequantise", "correct:dequantise", "correctness", 2, 30),
    Part("resume", "runs:resume", "correctness", 12, 75),
    Part("answers", "runs:answers", "correctness", 6, 40),
    Part("llava_gradients", "correct:llava_gradients", "correctness", 6, 40),
    Part("lora_1_8b", "speed:lora_1_8b", "speed", 20, 60),
    Part("qlora_7b", "speed:qlora_7b", "speed", 25, 75),
    Part("lora_1_8b_plain", "speed:lora_1_8b_plain", "speed", 15, 45),
    Part("qlora_7b_plain", "speed:qlora_7b_plain", "speed", 20, 60),
    Part("tests", "runs:marked_tests", "correctness", 20, 90),
    Part("lora_7b", "speed:lora_7b", "speed", 20, 60),
    Part("full_1_8b", "speed:full_1_8b", "speed", 15, 45),
    Part("llava_stage_1", "speed:llava_stage_1", "speed", 15, 45),
    Part("llava_stage_2", "speed:llava_stage_2", "speed", 15, 45),
    Part("chat_7b", "answering:chat_7b", "speed", 15, 50),
    Part("chat_7b_nf4", "answering:chat_7b_nf4", "speed", 15, 50),
    Part("longest_8b", "speed:longest_8b", "speed", 40, 90),
    Part("merge_7b", "answering:merge_7b", "speed", 30, 90),
    Part("peer_lora_1_8b", "peers:lora_1_8b", "speed", 30, 120),
    Part("peer_qlora_7b", "peers:qlora_7b", "speed", 40, 150),
    Part("peer_lora_7b", "peers:lora_7b", "speed", 40, 150),
    Part("chat_7b_compiled", "answering:chat_7b_compiled", "speed", 60, 200),
)
"""Estimates are guesses until they are measured on a GPU; the report has the actual time of each
part."""

BY_NAME = {part.name: part for part in PARTS}
