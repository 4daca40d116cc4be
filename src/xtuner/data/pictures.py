"""Pictures of a data set: find them in their folder, check them, decode them.

A name in a data file is taken relative to the folder and must not lead out of it, so that a data
set from a stranger cannot have private pictures read. Only a few formats are opened, and nothing
is decoded that has more than `MAX_PIXELS`: 20 kB of PNG can hold half a gigabyte.
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
"""Most pixels of a picture; decoded they take 192 MB."""


class PictureError(DataError):
    """A picture cannot be used.

    Attributes:
        problem: what is wrong with it and how to cure it, without its name.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"image {self.name!r} {self.problem}"


@dataclass(frozen=True)
class PictureFolder:
    """The folder that names of pictures are relative to (the setting `image_folder`)."""

    root: Path

    def find(self, name: str) -> Path:
        """The file of picture `name`.

        Links of folders are followed, for large data sets often lie elsewhere; a link of a single
        file may not lead out.

        Raises:
            PictureError: it lies outside the folder, or is not there.
        """
        if "://" in name or name.startswith("data:"):
            raise PictureError(
                _shortened(name), "is no file; download it and name it relative to image_folder"
            )
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        if not _within(path, root):
            raise PictureError(name, f"lies outside image_folder ({root}), which is refused")
        if os.path.islink(path):
            target = os.path.realpath(path)
            if not _within(target, os.path.realpath(root)):
                raise PictureError(name, f"is a link that leads out of image_folder ({root})")
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "is not there"
            raise PictureError(name, f"{what} (image_folder is {root})")
        return Path(path)

    def check(self, name: str) -> None:
        """Read picture `name` to its end, as small as its format allows.

        Raises:
            PictureError: it cannot be found or decoded.
        """
        with self.find(name).open("rb") as file:
            _decode(file, name, small=True)

    def load(self, name: str) -> Image.Image:
        """Decode picture `name`; see `decode`."""
        with self.find(name).open("rb") as file:
            return decode(file, name)


def decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode a picture to RGB, upright as its EXIF data say.

    Raises:
        PictureError: the file is no picture of a known format, is damaged or too large.
    """
    from PIL import ImageOps

    return ImageOps.exif_transpose(_decode(file, name)).convert("RGB")


def open_picture(path: str | Path) -> Image.Image:
    """Decode the picture at `path`, wherever it is: for pictures that the user names.

    Raises:
        PictureError: it is not there or cannot be decoded.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return decode(file, str(path))
    except OSError as error:
        raise PictureError(str(path), f"cannot be opened: {error.strerror or error}") from error


def _decode(file: BinaryIO, name: str, *, small: bool = False) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own cap only warns; ours follows
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    name,
                    f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}; make it smaller",
                )
            if small:
                image.draft("RGB", (1, 1))  # JPEG can be read to its end at an eighth of the work
            image.load()
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(name, f"is no picture in {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        problem = f"has more than {MAX_PIXELS:,} pixels; make it smaller"
        raise PictureError(name, problem) from error
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise PictureError(name, f"is damaged: {' '.join(str(error).split())}") from error
    return image


def _within(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _shortened(name: str) -> str:
    return name if len(name) < 60 else name[:57] + "..."
