"""Write a model again in shards of another size, bit for bit the same."""

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
    tell: Callable[[str], None] = print,
) -> None:
    """Write the model folder `src` to `dst` in safetensors shards of at most `max_shard_size`.

    One shard at a time is in memory; other files are copied. Every tensor is read back and
    compared.

    Args:
        src: a model in Hugging Face format, safetensors or .bin.
        dst: a new folder.
        max_shard_size: such as '2GB'; a larger tensor gets a shard of its own.
        tell: gets lines of progress.

    Raises:
        ModelError: `src` holds no model, is damaged, or what was written differs.
        LaunchError: `dst` is taken, or the disk is too full.
    """
    max_bytes = parse_size(max_shard_size)
    refuse_links_out(src)
    weights = Weights.of_model(src)
    plan = cast_plan(weights.stored, None)
    with new_folder(dst, num_bytes=total_bytes(plan)) as draft:
        write_shards(draft, plan, weights.__getitem__, max_bytes=max_bytes, tell=tell)
        # `dst` may lie inside `src`, and then so does the hidden draft, which is not copied.
        replaced = [file.name for file in weights.files]
        copy_others(src, draft, skip=[*replaced, "model.safetensors.index.json",
                                      "pytorch_model.bin.index.json"])  # fmt: skip
        written = Weights.of_model(draft)
        for name in plan:
            if not _same_bits(weights[name], written[name]):
                raise ModelError(f"{name} was not written as it was read; is the disk sound?")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, since NaN is not equal to itself.
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
