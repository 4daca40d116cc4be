"""Images that settings name: files, or URLs, downloaded once with a limit on time and size."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from xtuner.cache_dir import cache_dir
from xtuner.data.images.files import open_image
from xtuner.data.sources.find import below
from xtuner.data.tokenize.cache import is_ours, own_folder
from xtuner.errors import DataError

SECONDS = 30.0
"""Time limit for one image."""
MAX_BYTES = 20_000_000
_PIECE = 1 << 16


def is_url(name: str) -> bool:
    """Whether `name` is a URL."""
    return name.startswith(("http://", "https://"))


def image_path(name: str, *, data_root: str | None, folders: Sequence[Path]) -> str:
    """The path of an image that settings name, which is fetched if it is a URL.

    Args:
        name: A URL, or a file name in `data_root`, the working directory or one of `folders`.
        data_root: The setting; may be relative to the first of `folders`.
        folders: Where to look for the file.
    """
    if is_url(name):
        return str(fetched(name))
    found = below(name, data_root, folders[0])
    paths = (Path(found), *(folder / found for folder in folders))
    return next((str(path) for path in paths if path.is_file()), found)


def fetched(url: str, *, seconds: float = SECONDS, most: int = MAX_BYTES) -> Path:
    """The file of the image at `url`; it is stored in the cache of data sets.

    Raises:
        DataError: It cannot be downloaded in `seconds`, has more than `most` bytes, or is not an
            image.
    """
    home = cache_dir() / "images"
    path = home / hashlib.sha256(url.encode()).hexdigest()[:32]
    if not (path.is_file() and is_ours(home)):
        content = _read(url, seconds, most)
        try:
            own_folder(home)
            draft = home / f".{path.name}.{os.getpid()}"
            draft.write_bytes(content)
            open_image(str(draft))
            os.replace(draft, path)
        except OSError as error:
            raise DataError(f"image {url!r}: cannot be stored in {home}: {error}") from error
        except DataError as error:
            draft.unlink()
            raise DataError(f"image {url!r}: is not usable as an image: {error}") from error
    return path


def _read(url: str, seconds: float, most: int) -> bytes:
    advice = "download it, and name the file"
    end = time.monotonic() + seconds
    request = urllib.request.Request(url, headers={"User-Agent": "xtuner"})
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=min(seconds, 10.0)) as answer:
            while piece := answer.read1(_PIECE):
                content += piece
                if len(content) > most:
                    raise DataError(f"image {url!r}: has more than {most:,} bytes; {advice}")
                if time.monotonic() > end:
                    raise DataError(f"image {url!r}: took more than {seconds:g} seconds; {advice}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the error holds the connection
        raise DataError(f"image {url!r}: cannot be downloaded: {error}; {advice}") from error
    return bytes(content)
