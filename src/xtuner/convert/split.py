"""Re-shard a model; the tensors stay bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.weights import Weights, cast_plan, parse_size, total_bytes, write_shards
from xtuner.errors import ModelError
from xtuner.hub.links import refuse_links_out


def split(
    src: Path,
    dst: Path,
    *,
    max_shard_size: str = "2GB",
    log: Callable[[str], None] = print,
) -> None:
    """Write the model folder `src` to `dst` in safetensors shards of at most `max_shard_size`.

    Only one shard is in memory at a time; other files are copied. Every tensor is read back and
    compared.

    Args:
        src: A model in Hugging Face format, safetensors or .bin.
        dst: A new folder.
        max_shard_size: Such as '2GB'; a larger tensor gets a shard of its own.
        log: Receives progress messages.

    Raises:
        ModelError: `src` contains no model or is damaged, or the written tensors differ.
        LaunchError: `dst` is not empty, or the disk space is insufficient.
    """
    max_bytes = parse_size(max_shard_size)
    refuse_links_out(src)
    weights = Weights.of_model(src)
    plan = cast_plan(weights.stored, None)
    with new_folder(dst, num_bytes=total_bytes(plan)) as draft:
        write_shards(draft, plan, weights.__getitem__, max_bytes=max_bytes, log=log)
        # `dst` may be inside `src`, but the draft is hidden and therefore not copied.
        replaced = [file.name for file in weights.files]
        copy_others(src, draft, skip=[*replaced, "model.safetensors.index.json",
                                      "pytorch_model.bin.index.json"])  # fmt: skip
        written = Weights.of_model(draft)
        for name in plan:
            if not _same_bits(weights[name], written[name]):
                raise ModelError(
                    f"{dst}: the written tensor {name} differs from the source; check the disk"
                )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Compare bytes, since NaN != NaN.
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
