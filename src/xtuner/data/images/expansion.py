"""How images stand among tokens, and how the images of a batch are read.

The place of an image is one token, ``<image>``, and becomes as many of that token as the visual
encoder gives features. Lengths, packs and masks then count images like text. Pixels are read when
a batch is put together, in the processes that load data: never more than those of a few batches.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtuner.data.images.files import ImageError, ImageFolder, decode
from xtuner.data.sources.rows import Fault
from xtuner.errors import DataError
from xtuner.types import IMAGE, Batch, BatchImages, Encoded, Sample

Collate = Callable[[Sequence[Sample]], Batch]


@dataclass(frozen=True)
class ImageLayout:
    """What the data part knows of the eyes of a model.

    Attributes:
        folder: where images are.
        token_id: the token ``<image>``.
        tokens_each: how many of it stand for one image.
    """

    folder: ImageFolder
    token_id: int
    tokens_each: int

    def laid_out(self, encoded: Encoded, images: Sequence[str]) -> Encoded | Fault:
        """`encoded` with the place of each image made as long as the image; a fault if the
        places are not as many as `images`, or an image cannot be used."""
        places = encoded.input_ids.count(self.token_id)
        if places != len(images):
            problem = f"has {places} times {IMAGE} in its text for {len(images)} images"
            return Fault(f"{problem}; write one for each, where the image belongs")
        for name in images:
            try:
                self.folder.check(name)
            except ImageError as error:
                return Fault(error.problem, f"image {name!r}", file=name)
            except OSError as error:
                problem = f"cannot be read: {error.strerror or error}"
                return Fault(problem, f"image {name!r}", file=name)
        return self.widened(encoded)

    def is_sound(self, name: str) -> bool:
        """Whether an image can be used."""
        try:
            self.folder.check(name)
        except (ImageError, OSError):
            return False
        return True

    def widened(self, encoded: Encoded) -> Encoded:
        """`encoded` with each place of an image as long as the image; it is not supervised."""
        ids: list[int] = []
        mask: list[bool] = []
        for token_id, supervised in zip(*encoded, strict=True):
            times = self.tokens_each if token_id == self.token_id else 1
            ids += [token_id] * times
            mask += [supervised and token_id != self.token_id] * times
        return Encoded(ids, mask)

    def whole(self, sample: Sample) -> Sample:
        """`sample` without the image that max_length cut in two, if one: it is the end of it."""
        if not sample.images:
            return sample
        tokens = int((sample.input_ids == self.token_id).sum())
        whole, rest = divmod(tokens, self.tokens_each)
        end = len(sample.input_ids) - rest
        return replace(
            sample,
            input_ids=sample.input_ids[:end],
            loss_mask=sample.loss_mask[:end],
            images=sample.images[:whole],
        )

    def facts(self) -> dict[str, Any]:
        """What encoded rows depend on."""
        root = str(self.folder.root.resolve())
        return {"image_token": self.token_id, "tokens_each": self.tokens_each, "folder": root}


@dataclass(frozen=True)
class ImageCollate:
    """Puts batches together with the pixels of their images.

    Attributes:
        collate: of the algorithm; lays out the tokens.
        image_layout: where images are and how long.
        pixels: makes a decoded image ``[3, H, W]``.
        kept: finds the features of an image by the hash of its content, or None; None where
            features are not kept.
    """

    collate: Collate
    image_layout: ImageLayout
    pixels: Callable[[Any], np.ndarray]
    kept: Callable[[str], Tensor | None] | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """See `Batch`.

        Raises:
            DataError: an image cannot be read any more; names the row and the file.
        """
        whole = [self.image_layout.whole(sample) for sample in samples]
        batch = self.collate(whole)
        if not any(sample.images for sample in whole):
            return batch
        found = [self._read(sample, name) for sample in whole for name in sample.images]
        pixels = [values for _, values, _ in found if values is not None]
        images = BatchImages(
            pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, 3, 1, 1),
            token_mask=batch.input_ids == self.image_layout.token_id,
            counts=tuple(len(sample.images) for sample in whole),
            features=tuple(features for _, _, features in found),
            keys=tuple(key for key, _, _ in found if key),
        )
        return replace(batch, images=images)

    def _read(self, sample: Sample, name: str) -> tuple[str, np.ndarray | None, Tensor | None]:
        """The image's key, and its pixels or its features."""
        try:
            raw = self.image_layout.folder.find(name).read_bytes()
            key = hashlib.sha256(raw).hexdigest() if self.kept else ""
            features = self.kept(key) if self.kept else None
            if features is not None:
                return key, None, features
            return key, self.pixels(decode(io.BytesIO(raw), name)), None
        except (ImageError, OSError) as error:
            raise DataError(
                f"{sample.row}: {error}. It was sound when the data was prepared: restore the file"
            ) from error


def open_image_folder(
    image_folder: str | None, *, data_root: str | None, folder: Path
) -> ImageFolder:
    """The folder of the images; a relative one is looked up below `data_root`, in `folder` (that
    of the settings file), and where we are.

    Raises:
        DataError: there is no such folder.
    """
    roots = [*([folder / Path(data_root).expanduser(), Path(data_root)] if data_root else []),
             folder, Path.cwd()]  # fmt: skip
    places = [root / Path(image_folder or ".").expanduser() for root in roots]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise DataError(f"image_folder = {image_folder!r}: there is no such folder ({looked})")
    return ImageFolder(found)
