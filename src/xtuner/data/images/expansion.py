"""Expands images to tokens, and reads the images of a batch.

An image is one token, ``<image>``, in the text, which is repeated as often as the image processor
says. Lengths, packs and masks then treat images like text. Pixels are read when a batch is
collated, in the processes that load data: only those of a few batches are in memory.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtuner.data.images.files import ImageError, ImageFolder, decode, image_size
from xtuner.data.sources.rows import Fault
from xtuner.errors import DataError, count
from xtuner.types import IMAGE, Batch, BatchImages, Encoded, ImageProcessor, ImageRef, Sample

Collate = Callable[[Sequence[Sample]], Batch]


def expand(
    input_ids: Sequence[int], token_id: int, counts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Repeat each image token as often as its image has tokens.

    Args:
        input_ids: Token ids with one token per image.
        token_id: The token ``<image>``.
        counts: Tokens of each image, in order; as many as there are image tokens.

    Returns:
        The new ids, and how often each of `input_ids` occurs in them.
    """
    each = iter(counts)
    times = [next(each) if i == token_id else 1 for i in input_ids]
    return [i for i, count in zip(input_ids, times, strict=True) for _ in range(count)], times


@dataclass(frozen=True)
class ImageLayout:
    """What the data pipeline needs to know about a model with image input.

    Attributes:
        folder: The folder of the images.
        token_id: The token ``<image>``.
        processor: Returns the number of tokens of an image, and preprocesses its pixels.
    """

    folder: ImageFolder
    token_id: int
    processor: ImageProcessor

    def expanded(
        self, encoded: Encoded, names: Sequence[str]
    ) -> tuple[Encoded, tuple[ImageRef, ...]] | Fault:
        """`encoded` with each image token repeated and masked, and the images. A fault if the
        number of image tokens differs from that of `names`, or an image cannot be used.
        """
        placeholders = encoded.input_ids.count(self.token_id)
        if placeholders != len(names):
            found = count(placeholders, "time")
            problem = f"contains {IMAGE} {found} for {count(len(names), 'image')}"
            return Fault(f"{problem}; write one per image, where the image belongs")
        images: list[ImageRef] = []
        for name in names:
            try:
                size = self.folder.check(name)
            except ImageError as error:
                return Fault(error.problem, f"image {name!r}", file=name)
            except OSError as error:
                problem = f"cannot be read: {error.strerror or error}"
                return Fault(problem, f"image {name!r}", file=name)
            images.append(ImageRef(name, self.processor.num_tokens(size)))
        ids, times = expand(
            encoded.input_ids, self.token_id, [image.num_tokens for image in images]
        )
        mask = [
            supervised and token_id != self.token_id
            for token_id, supervised, count in zip(
                encoded.input_ids, encoded.loss_mask, times, strict=True
            )
            for _ in range(count)
        ]
        weights = encoded.weights and [
            weight
            for weight, count in zip(encoded.weights, times, strict=True)
            for _ in range(count)
        ]
        return Encoded(ids, mask, weights), tuple(images)

    def is_usable(self, name: str) -> bool:
        """Whether an image can be used."""
        try:
            self.folder.check(name)
        except (ImageError, OSError):
            return False
        return True

    def without_cut_image(self, sample: Sample) -> Sample:
        """`sample` without the images that max_length cut off or cut in two."""
        if not sample.images:
            return sample
        rest = int((sample.input_ids == self.token_id).sum())
        kept = 0
        while kept < len(sample.images) and rest >= sample.images[kept].num_tokens:
            rest -= sample.images[kept].num_tokens
            kept += 1
        end = len(sample.input_ids) - rest
        return replace(
            sample,
            input_ids=sample.input_ids[:end],
            loss_mask=sample.loss_mask[:end],
            weights=None if sample.weights is None else sample.weights[:end],
            images=sample.images[:kept],
        )

    def facts(self) -> dict[str, Any]:
        """What encoded rows depend on."""
        root = str(self.folder.root.resolve())
        return {"image_token": self.token_id, "folder": root, "images": self.processor.facts()}


class _Read(NamedTuple):
    """An image that was read: its key, its size, and its pixels or its features."""

    key: str
    size: tuple[int, int]
    pixels: np.ndarray | None
    features: Tensor | None


@dataclass(frozen=True)
class ImageCollate:
    """Collates batches with the pixels of their images.

    Attributes:
        collate: The algorithm's function, which lays out the tokens.
        image_layout: Where images are, and how they are preprocessed.
        kept: Returns the cached features of an image by the hash of its content, if any; None if
            features are not cached.
    """

    collate: Collate
    image_layout: ImageLayout
    kept: Callable[[str], Tensor | None] | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """See `Batch`.

        Raises:
            DataError: An image can no longer be read, or has changed since the data were prepared;
                names the row and the file.
        """
        samples = [self.image_layout.without_cut_image(sample) for sample in samples]
        batch = self.collate(samples)
        if not any(sample.images for sample in samples):
            return batch
        found = [self._read(sample, image) for sample in samples for image in sample.images]
        images = BatchImages(
            pixel_values=tuple(
                torch.from_numpy(read.pixels) for read in found if read.pixels is not None
            ),
            mask=batch.input_ids == self.image_layout.token_id,
            sizes=tuple(read.size for read in found),
            counts=tuple(len(sample.images) for sample in samples),
            features=tuple(read.features for read in found),
            keys=tuple(read.key for read in found if read.key),
        )
        return replace(batch, images=images)

    def _read(self, sample: Sample, image: ImageRef) -> _Read:
        processor = self.image_layout.processor
        try:
            raw = self.image_layout.folder.find(image.name).read_bytes()
            key = hashlib.sha256(raw).hexdigest() if self.kept else ""
            features = self.kept(key) if self.kept else None
            pixels = None
            if features is None:
                decoded = decode(io.BytesIO(raw), image.name)
                size, pixels = decoded.size, processor.preprocess(decoded)
            else:
                size = image_size(io.BytesIO(raw), image.name)
        except (ImageError, OSError) as error:
            raise DataError(
                f"{sample.row}: {error}. It was valid when the data were prepared: restore the file"
            ) from error
        if (tokens := processor.num_tokens(size)) != image.num_tokens:
            raise DataError(
                f"{sample.row}: image {image.name!r} takes {count(tokens, 'token')}, but took "
                f"{image.num_tokens} when the data were prepared: restore the file"
            )
        return _Read(key, size, pixels, features)


def open_image_folder(
    image_folder: str | None, *, data_root: str | None, folder: Path
) -> ImageFolder:
    """The folder of the images; a relative one is looked up in `data_root`, in `folder` (that of
    the settings file), and in the working directory.

    Raises:
        DataError: The folder does not exist.
    """
    roots = [*([folder / Path(data_root).expanduser(), Path(data_root)] if data_root else []),
             folder, Path.cwd()]  # fmt: skip
    paths = [root / Path(image_folder or ".").expanduser() for root in roots]
    found = next((path for path in paths if path.is_dir()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(map(str, paths)))
        raise DataError(f"image_folder = {image_folder!r}: no such folder ({looked})")
    return ImageFolder(found)
