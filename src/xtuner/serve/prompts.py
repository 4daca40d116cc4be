"""From a request to the prompt that training saw: messages, images and token ids."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from xtuner.calls.check import call_problems, with_ids
from xtuner.calls.read import CallFormatError, read_call
from xtuner.data.images.files import open_image
from xtuner.errors import ConfigError, DataError
from xtuner.generation.images import question
from xtuner.serve.models import ServedModel
from xtuner.serve.requests import ChatMessage
from xtuner.types import IMAGE, Conversation, Message

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
MOST_IMAGES = 16


class ImageStore:
    """The images of one request, in a folder that is deleted with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[ImageStore]:
        """A store that exists inside the block."""
        with TemporaryDirectory(prefix="xtuner-images-") as folder:
            yield cls(Path(folder))

    def keep(self, url: str) -> str:
        """Write the image of a data URL to a file, and return its name.

        Raises:
            DataError: `url` is not a data URL of an image that can be opened.
        """
        match = _DATA_URL.match(url)
        if match is None:
            raise DataError(
                "image_url: must be a data URL (data:image/png;base64,...); this server does not "
                "fetch images"
            )
        self._count += 1
        if self._count > MOST_IMAGES:
            raise DataError(f"image_url: a request may have at most {MOST_IMAGES} images")
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"image_url: is not base64: {error}") from error
        path = self._folder / hashlib.sha256(content).hexdigest()[:32]
        path.write_bytes(content)
        open_image(path)
        return str(path)


def messages_of(
    turns: Sequence[ChatMessage], served: ServedModel, images: ImageStore
) -> list[Message]:
    """The turns as messages.

    Raises:
        DataError: An image cannot be used, or the model does not take images.
        ConfigError: A turn is malformed, or a result has no call.
    """
    conversation = Conversation(tuple(_message(turn, served, images) for turn in turns))
    if problem := next(call_problems(conversation), None):
        raise ConfigError(f"messages: {problem}")
    return list(with_ids(conversation).messages)


def _message(turn: ChatMessage, served: ServedModel, images: ImageStore) -> Message:
    if turn.tool_calls and turn.role != "assistant":
        raise ConfigError("messages: only messages of the assistant may have tool_calls")
    try:
        calls = tuple(read_call(call, "tool_calls") for call in turn.tool_calls or ())
    except CallFormatError as error:
        raise ConfigError(f"messages: {error}") from error
    role = "system" if turn.role == "developer" else turn.role
    parts = turn.content if isinstance(turn.content, list) else []
    names = [images.keep(part.image_url.url) for part in parts if part.image_url]
    text = "\n".join(IMAGE if part.text is None else part.text for part in parts)
    if isinstance(turn.content, str):
        text = turn.content
    if not names:
        message = served.template.answer(text) if role == "assistant" else Message(role, text)
        return replace(message, tool_calls=calls, name=turn.name, tool_call_id=turn.tool_call_id)
    if served.vision is None:
        raise DataError(f"the model {served.name} does not take images")
    if role != "user":
        raise DataError("image_url: only messages of the user may have images")
    return question(text, names)


def prompt_ids(
    served: ServedModel, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids of a conversation's prompt: the beginning of those that training saw.

    Raises:
        DataError: The template does not support these messages.
        ConfigError: How the model writes tool calls is not known.
    """
    with served.tokenizing() as template:
        if tools and template.tool_family is None:
            raise ConfigError(f"tools: how {served.name} writes tool calls is not known")
        return template.prompt_ids(messages, tools=tools)


def text_ids(served: ServedModel, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a text for the model to continue, as in pretraining.

    Raises:
        DataError: An id is outside the vocabulary, or the text is empty.
    """
    if isinstance(prompt, str):
        with served.tokenizing():
            ids = served.verbatim.prompt_ids([Message("user", prompt)])
    else:
        ids = list(prompt)
    size = int(served.weights.model.get_input_embeddings().weight.shape[0])
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise DataError(f"prompt: the id {wrong[0]} is outside the vocabulary of {size:,} tokens")
    if not ids:
        raise DataError("prompt: is empty")
    return ids
