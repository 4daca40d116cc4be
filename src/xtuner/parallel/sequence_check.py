"""Checks, before processes start, whether they can share rows."""

from __future__ import annotations

from pathlib import Path

from xtuner.config.schema import Settings
from xtuner.errors import LaunchError, count
from xtuner.hub import fetch
from xtuner.hub.json_files import read_object
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
            f"{count(heads, 'attention head')}, so the maximum is {heads}"
        )


def _heads(model: str) -> int | None:
    folder = Path(model) if Path(model).is_dir() else fetch.cached(model)
    config = read_object(folder / "config.json") if folder else {}
    text = config.get("text_config")
    heads = (text if isinstance(text, dict) else config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None
