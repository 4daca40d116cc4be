"""Find, check and decode the images of a data set.

A name in a data file is relative to the folder and must not lead out of it, so that an untrusted
data set cannot read private images. Only a few formats are opened, and nothing is decoded that has
more than `MAX_PIXELS`, or would have when it is padded to a square: 20 kB of PNG can hold half a
gigabyte, and 254 bytes a line that becomes a square of ten.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xtuner.errors import DataError, message_of

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000
"""Maximum pixels of an image; decoded they take 192 MB."""
MAX_SIDE = 10_000
"""Maximum side: padded to a square the image takes 300 MB. Cameras of 60 megapixels have 9,500."""
MAX_RATIO = 100
"""Maximum ratio of the sides: if the shorter one is scaled to 336, the input of the encoder, the
image has at most 11 million pixels."""

_ORIENTATION, _QUARTER_TURNS = 0x0112, 5
"""The EXIF tag of the orientation; from 5 on width and height are swapped."""


class ImageError(DataError):
    """An image that cannot be used.

    Attributes:
        problem: What is wrong and what to do, without the image's name.
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

        The folder itself may be a link, since large data sets are often stored elsewhere; a link in
        it must not lead out.

        Raises:
            ImageError: It is outside the folder, or does not exist.
        """
        if "://" in name or name.startswith("data:"):
            raise ImageError(
                _shortened(name), "is not a file; download it and name it relative to image_folder"
            )
        if "\0" in name or not _encodable(name):
            raise ImageError(
                _shortened(name), "is not a file name: it contains a NUL or an incomplete character"
            )
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        if not _within(path, root):
            raise ImageError(name, f"is outside image_folder ({root}), which is not allowed")
        target = os.path.realpath(path)
        if not _within(target, os.path.realpath(root)):
            raise ImageError(
                name,
                f"is reached by a link that leads out of image_folder ({root}), which is not "
                f"allowed; set image_folder to the real folder (the image is {target!r})",
            )
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "does not exist"
            raise ImageError(name, f"{what} (image_folder is {root})")
        return Path(path)

    def check(self, name: str) -> tuple[int, int]:
        """Decode image `name` completely, at the lowest resolution that its format allows; return
        its size.

        Raises:
            ImageError: It cannot be found or decoded.
        """
        with self.find(name).open("rb") as file:
            decode(file, name, small=True)
            file.seek(0)
            return image_size(file, name)


def decode(file: BinaryIO, name: str, *, small: bool = False) -> Image.Image:
    """Decode an image to RGB, rotated according to its EXIF data.

    Args:
        small: Decode at the lowest resolution that the format allows, to check the file.

    Raises:
        ImageError: The file is not an image of a known format, or is damaged or too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit only warns; ours follows
            image = Image.open(file, formats=FORMATS)
            _refuse_large(image.size, name)
            if small:
                image.draft("RGB", (1, 1))  # JPEG can be decoded at an eighth of the resolution
            return _upright_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, f"is not an image in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        problem = f"has more than {MAX_PIXELS:,} pixels; make it smaller"
        raise ImageError(name, problem) from error
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ImageError(name, f"is damaged: {message_of(error)}") from error


def image_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height of an image that `decode` would return, read from the file's header.

    Raises:
        ImageError: The file is not an image, or its header is damaged.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= _QUARTER_TURNS
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ImageError(name, f"is damaged: {message_of(error)}") from error
    return (height, width) if turned else (width, height)


def open_image(path: str | Path) -> Image.Image:
    """Decode the image at `path`, anywhere on disk: for images that the user names.

    Raises:
        ImageError: It does not exist or cannot be decoded.
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
        limit = f"pixels: a side has more than {MAX_SIDE:,}"
    elif longest > MAX_RATIO * shortest:
        limit = f"pixels: one side is more than {MAX_RATIO} times the other"
    else:
        return
    hint = "crop it" if "times" in limit else "make it smaller"
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
