"""Images of messages: assign image names to the ``<image>`` placeholders in the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xtuner.data.formats.base import RowError, kind, objects, text
from xtuner.errors import count
from xtuner.types import IMAGE, Message, Row


def read_names(row: Row, column: str) -> list[str]:
    """Read the image names of a row: a string or a list of strings, or missing."""
    value = row.get(column)
    if value is None or value == "":
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise RowError(column, f"is {kind(value)}", "it must be a file name or a list of them")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise RowError(f"{column}[{index}]", f"is {kind(name)}", "it must be a file name")
    return list(names)


def share_out(messages: Sequence[Message], names: Sequence[str], *, column: str) -> list[Message]:
    """Assign `names` in order to the placeholders in `messages` that have no image yet.

    Raises:
        RowError: The numbers of placeholders and images differ, or an answer has a placeholder.
    """
    remaining = list(names)
    placeholders = 0
    assigned = []
    for message in messages:
        needed = message.content.count(IMAGE) - len(message.images)
        placeholders += needed
        if needed and message.role == "assistant":
            hint = "images belong in user turns"
            raise RowError(column, f"has {IMAGE} in an assistant turn", hint)
        own, remaining = remaining[:needed], remaining[needed:]
        assigned.append(replace(message, images=(*message.images, *own)) if own else message)
    if placeholders != len(names):
        raise RowError(
            column,
            f"has {count(placeholders, f'{IMAGE} placeholder')} for {count(len(names), 'image')}",
            "write one for each image",
        )
    return assigned


def read_parts(parts: Sequence[Any], *, where: str) -> tuple[str, tuple[str | None, ...]]:
    """Read a content that is a list of text and image parts, as in chat APIs.

    Returns:
        The text with ``<image>`` on a separate line for each image, and the image names; None is an
        image that is named elsewhere in the row.
    """
    content, names = "", []
    for path, part in objects(parts, within=where):
        match part.get("type"):
            case "text":
                # LLaMA-Factory's v1_sft names the content of every part `value`.
                column = "value" if "value" in part and "text" not in part else "text"
                content += text(part, column, within=path)
            case "image_url" | "image":
                if content and not content.endswith("\n"):
                    content += "\n"
                content += f"{IMAGE}\n"
                names.append(_name(part, path))
            case other:
                hint = "it must be text, image or image_url"
                raise RowError(f"{path}type", f"is {other!r}", hint)
    return content, tuple(names)


def _name(part: Mapping[str, Any], path: str) -> str | None:
    for key in ("image", "path", "image_url", "url", "value"):
        value = part.get(key)
        if isinstance(value, Mapping):
            path, key, value = f"{path}{key}.", "url", value.get("url")
        if isinstance(value, str) and value.strip():
            return value.removeprefix("file://")
        if value is not None:
            raise RowError(f"{path}{key}", f"is {kind(value)}", "it must be a file name")
    return None
