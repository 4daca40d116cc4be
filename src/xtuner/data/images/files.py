"""Images of a data set: find them in their folder, check them, decode them.

A name in a data file is taken relative to the folder and must not lead out of it, so that a data
set from a stranger cannot have private images read. Only a few formats are opened, and nothing
is decoded that has more than `MAX_PIXELS`, or would have when it is filled up to a square: 20 kB of
PNG can hold half a gigabyte, and 254 bytes a line that becomes a square of ten.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xtuner.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000
"""Most pixels of an image; decoded they take 192 MB."""
MAX_SIDE = 10_000
"""Longest side: filled up to a square the image takes 300 MB. Cameras of 60 megapixels have
9,500."""
MAX_RATIO = 100
"""Longest side over shortest: scaled until the shortest fits an encoder of 336 x 336, the image
has at most 11 million pixels."""

_ORIENTATION, _QUARTER_TURNS = 0x0112, 5
"""The EXIF tag of the orientation; from 5 on width and height are exchanged."""


class ImageError(DataError):
    """An image cannot be used.

    Attributes:
        problem: what is wrong with it and what to do about it, without its name.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"image {self.name!r} {self.problem}"


@dataclass(frozen=True)
class ImageFolder:
    """The folder that names of images are relative to (the setting `image_folder`)."""

    root: Path

    def find(self, name: str) -> Path:
        """The file of image `name`.

        The folder itself may be a link, for large data sets often lie elsewhere; a link in it may
        not lead out.

        Raises:
            ImageError: it lies outside the folder, or is not there.
        """
        if "://" in name or name.startswith("data:"):
            raise ImageError(
                _shortened(name), "is no file; download it and name it relative to image_folder"
            )
        if "\0" in name or not _encodable(name):
            raise ImageError(
                _shortened(name), "is no name of a file: it holds a NUL or half a character"
            )
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        if not _within(path, root):
            raise ImageError(name, f"lies outside image_folder ({root}), which is refused")
        target = os.path.realpath(path)
        if not _within(target, os.path.realpath(root)):
            raise ImageError(
                name,
                f"is reached by a link that leads out of image_folder ({root}), which is refused; "
                f"set image_folder to the real folder (the image is {target!r})",
            )
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "is not there"
            raise ImageError(name, f"{what} (image_folder is {root})")
        return Path(path)

    def check(self, name: str) -> tuple[int, int]:
        """Read image `name` to its end, as small as its format allows; return its size.

        Raises:
            ImageError: it cannot be found or decoded.
        """
        with self.find(name).open("rb") as file:
            decode(file, name, small=True)
            file.seek(0)
            return image_size(file, name)

    def load(self, name: str) -> Image.Image:
        """Decode image `name`; see `decode`."""
        with self.find(name).open("rb") as file:
            return decode(file, name)


def decode(file: BinaryIO, name: str, *, small: bool = False) -> Image.Image:
    """Decode an image to RGB, upright as its EXIF data say.

    Args:
        file: of an image.
        name: what the errors call it.
        small: as small as its format allows: enough to know that it is sound.

    Raises:
        ImageError: the file is no image of a known format, is damaged or too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own cap only warns; ours follows
            image = Image.open(file, formats=FORMATS)
            _refuse_large(image.size, name)
            if small:
                image.draft("RGB", (1, 1))  # JPEG can be read to its end at an eighth of the work
            return _upright_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, f"is no image in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        problem = f"has more than {MAX_PIXELS:,} pixels; make it smaller"
        raise ImageError(name, problem) from error
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ImageError(name, f"is damaged: {' '.join(str(error).split())}") from error


def image_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height of an image that `decode` would return, read from the file's header.

    Raises:
        ImageError: the file is no image, or its header is damaged.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= _QUARTER_TURNS
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ImageError(name, f"is damaged: {' '.join(str(error).split())}") from error
    return (height, width) if turned else (width, height)


def open_image(path: str | Path) -> Image.Image:
    """Decode the image at `path`, wherever it is: for images that the user names.

    Raises:
        ImageError: it is not there or cannot be decoded.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return decode(file, str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or error
        raise ImageError(str(path), f"cannot be opened: {problem}") from error


def _refuse_large(size: tuple[int, int], name: str) -> None:
    width, height = size
    longest, shortest = max(size), max(1, min(size))
    if width * height > MAX_PIXELS:
        limit = f"pixels, more than {MAX_PIXELS:,}"
    elif longest > MAX_SIDE:
        limit = f"pixels: more than {MAX_SIDE:,} on a side"
    elif longest > MAX_RATIO * shortest:
        limit = f"pixels: one side is more than {MAX_RATIO} times the other"
    else:
        return
    hint = "cut it to a better shape" if "times" in limit else "make it smaller"
    raise ImageError(name, f"has {width:,} x {height:,} {limit}; {hint}")


def _upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # grey in 16 bits, of which Pillow would keep the lower 8
        upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return upright.convert("RGB")


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _within(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _shortened(name: str) -> str:
    return name if len(name) < 60 else name[:57] + "..."
