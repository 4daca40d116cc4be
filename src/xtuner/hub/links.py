"""Reject links that lead out of a folder whose files are copied. Otherwise an untrusted folder
could cause a private file to be copied and shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xtuner.errors import ModelError


def refuse_links_out(folder: Path) -> None:
    """Raise if a file or folder in `folder` is a link to something outside it.

    `folder` itself may be a link. In the cache of the Hugging Face hub the files of a model are
    links to ``models--NAME/blobs``, which is allowed.

    Raises:
        ModelError: Names the link and its target.
    """
    allowed = list(_roots(folder))
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise ModelError(
                f"{path}: is a link to {target}, outside {folder}, which is not allowed: it would "
                "be copied. If the file belongs to the model, replace the link with the file"
            )


def _roots(folder: Path) -> Iterator[Path]:
    """The folders that links in `folder` may lead to."""
    real = folder.resolve()
    yield real
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
