"""Features of pictures, kept on disk by the pictures' content: later epochs skip the encoder.

<cache>/features/<hash of encoder and preparation>/<first two letters>/<hash of content>.npy

A file is written under another name and renamed, so it is whole or not there. bfloat16, which numpy
lacks, is kept as its bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtuner.data.cache import cache_root


@dataclass(frozen=True)
class FeatureStore:
    """The features that one visual encoder made of pictures prepared in one way."""

    folder: Path

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> FeatureStore:
        """The store for everything that features depend on besides the picture."""
        text = json.dumps(dict(facts), sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(cache_root().parent / "features" / name)

    def read(self, key: str) -> Tensor | None:
        """The features ``[T, C]`` of the picture with this hash; None where they are not kept."""
        try:
            values = np.load(self._file(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor

    def write(self, key: str, features: Tensor) -> None:
        """Keep features; a full disk costs time later, not the run."""
        file = self._file(key)
        values = features.detach().cpu().contiguous()
        values = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        draft = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(draft, values.numpy(), allow_pickle=False)
            os.replace(draft, file)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"
