"""Cache of image features on disk, keyed by the images' content: later epochs skip the encoder.

<cache>/features/<hash of encoder and preparation>/<first two letters>/<hash of content>.npy

The hash of the encoder is known when it is loaded: before that nothing is found or stored. A file
is written under another name and renamed, so it is complete or absent. bfloat16, which numpy lacks,
is kept as its bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtuner.cache_dir import cache_dir
from xtuner.data.tokenize.cache import is_ours, own_folder

logger = logging.getLogger("xtuner.data")


@dataclass
class FeatureStore:
    """The features that one vision tower computed from images with one preprocessing.

    Attributes:
        folder: The folder of the features; None before `open`.
        shape: Shape of the features of one image, ``[T, C]``.
    """

    folder: Path | None = None
    shape: tuple[int, ...] = ()

    def open(self, facts: Mapping[str, Any], *, shape: tuple[int, ...]) -> None:
        """Open the folder for everything that features depend on besides the image.

        Args:
            facts: The encoder, its weights and the preprocessing.
            shape: Shape of the features of one image, ``[T, C]``.
        """
        text = json.dumps(dict(facts), sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder, self.shape = cache_dir() / "features" / name, shape
        if self.folder.is_dir() and not is_ours(self.folder):
            logger.warning("%s belongs to another user: features are not cached", self.folder)
            self.folder = None

    def read(self, key: str) -> Tensor | None:
        """The features ``[T, C]`` of the image with this hash; None if they are missing or
        damaged."""
        if self.folder is None:
            return None
        try:
            values = np.load(self._file(self.folder, key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if values.shape != self.shape or values.dtype not in (np.float32, np.int16):
            return None
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor

    def write(self, key: str, features: Tensor) -> None:
        """Store features; a full disk does not stop the run."""
        if self.folder is None:
            return
        file = self._file(self.folder, key)
        values = features.detach().cpu().contiguous()
        values = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        draft = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        with contextlib.suppress(OSError):
            own_folder(self.folder)
            file.parent.mkdir(exist_ok=True)
            np.save(draft, values.numpy(), allow_pickle=False)
            os.replace(draft, file)

    @staticmethod
    def _file(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.npy"
