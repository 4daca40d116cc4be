"""Checks, before processes start, whether they can share rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.errors import LaunchError
from xtuner.hub import fetch
from xtuner.parallel.layout import RankLayout


def check_sequence_parallel(settings: Settings, processes: int) -> None:
    """Compare `sequence_parallel_size` with the number of processes and of attention heads.

    A hub model whose configuration is not on this machine is checked when it is loaded.

    Raises:
        LaunchError: Rows cannot be shared by this many processes.
    """
    size = settings.sequence_parallel_size
    RankLayout(0, processes, size)
    heads = _heads(settings.pretrained_model_name_or_path)
    if heads is not None and heads < size:
        raise LaunchError(
            f"sequence_parallel_size = {size}: {settings.pretrained_model_name_or_path} has "
            f"{heads} attention heads, so the maximum is {heads}"
        )


def _heads(model: str) -> int | None:
    folder = Path(model) if Path(model).is_dir() else fetch.cached(model)
    try:
        config: Any = json.loads((Path(str(folder)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    heads = (text if isinstance(text, dict) else config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None
