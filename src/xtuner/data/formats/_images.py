"""Images of messages: their names are shared out to the places ``<image>`` in the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xtuner.data.formats.base import RowError, kind, objects, text
from xtuner.types import IMAGE, Message, Row


def read_names(row: Row, column: str) -> list[str]:
    """Read the names of a row's images: one text, or a list of them; it may be missing."""
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
    """Give each message as many of `names` as its text has places that have no image yet.

    Raises:
        RowError: there are more places than images or the other way round, or an answer has one.
    """
    waiting = list(names)
    places = 0
    given = []
    for message in messages:
        wanted = message.content.count(IMAGE) - len(message.images)
        places += wanted
        if wanted and message.role == "assistant":
            hint = "images belong into turns of the user"
            raise RowError(column, f"has {IMAGE} in a turn of the assistant", hint)
        own, waiting = waiting[:wanted], waiting[wanted:]
        given.append(replace(message, images=(*message.images, *own)) if own else message)
    if places != len(names):
        raise RowError(
            column,
            f"has {_count(places, f'place {IMAGE}', f'places {IMAGE}')} for "
            f"{_count(len(names), 'image', 'images')}",
            "write one for each, where the image belongs",
        )
    return given


def read_parts(parts: Sequence[Any], *, where: str) -> tuple[str, tuple[str | None, ...]]:
    """Read a content of several parts: texts, and images as the chat interfaces take them.

    Returns:
        The text with ``<image>`` on a line of its own for each image, and the images' names;
        None stands for an image that is named elsewhere in the row.
    """
    content, names = "", []
    for place, part in objects(parts, within=where):
        match part.get("type"):
            case "text":
                content += text(part, "text", within=place)
            case "image_url" | "image":
                if content and not content.endswith("\n"):
                    content += "\n"
                content += f"{IMAGE}\n"
                names.append(_name(part, place))
            case other:
                hint = "it must be text, image or image_url"
                raise RowError(f"{place}type", f"is {other!r}", hint)
    return content, tuple(names)


def _name(part: Mapping[str, Any], place: str) -> str | None:
    for key in ("image", "path", "image_url", "url"):
        value = part.get(key)
        if isinstance(value, Mapping):
            place, key, value = f"{place}{key}.", "url", value.get("url")
        if isinstance(value, str) and value.strip():
            return value.removeprefix("file://")
        if value is not None:
            raise RowError(f"{place}{key}", f"is {kind(value)}", "it must be a file name")
    return None


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
