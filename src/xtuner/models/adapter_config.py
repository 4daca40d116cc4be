"""Reads the ``adapter_config.json`` of a PEFT adapter, which is untrusted input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` in `folder`.

    Raises:
        ModelError: It is missing or cannot be read.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if problem := _problem(config):
            raise ValueError(problem)
        return dict(config)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{folder}: is not an adapter: adapter_config.json cannot be read ({error}); "
            "give an iter_N folder or the output of `xtuner convert pth_to_hf`"
        ) from error


def _problem(config: Any) -> str:
    """The problem with the contents of an ``adapter_config.json``; empty if none is found."""
    if not isinstance(config, dict):
        return "it is not an object"
    kinds = {
        "peft_type": str, "r": int, "lora_alpha": int | float, "alpha_pattern": dict,
        "rank_pattern": dict, "bias": str, "lora_dropout": int | float,
        "alora_invocation_tokens": list,
    }  # fmt: skip
    for name, kind in kinds.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name} is {value!r:.40}"
    if not all(isinstance(token, int) for token in config.get("alora_invocation_tokens") or ()):
        return "alora_invocation_tokens are not token ids"
    return "" if config.get("peft_type") else "peft_type is missing"
