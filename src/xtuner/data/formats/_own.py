"""User-defined formats: a function in the user's file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.data.formats.base import Format, RowError, conversation
from xtuner.data.formats.openai import read_messages
from xtuner.errors import ConfigError
from xtuner.types import Conversation, Message, Preference, Record, Row, Text

_RETURNS = (
    "it must return a list of messages such as {'role': 'user', 'content': 'Hi'}, "
    "a string, or a Conversation, Text or Preference of xtuner.types"
)


def load(name: str, *, setting: str, folder: Path | None) -> Format:
    """Create a format from the function `name`.

    Raises:
        ConfigError: It cannot be loaded, or is not callable.
    """
    function = plugins.load_user_object(name, setting=setting, folder=folder)
    if not callable(function):
        raise ConfigError(
            f"{setting} = {name!r}: is {type(function).__name__}; it must be a function of one row"
        )
    return Format(
        name=name,
        description="User-defined.",
        columns=(),
        example={},
        convert=partial(_convert, function, name.rpartition(":")[2]),
    )


def _convert(function: Callable[[Row], Any], name: str, row: Row) -> Record:
    try:
        made = function(row)
    except RowError:
        raise
    except (Exception, SystemExit) as error:  # a bad row is reported, rather than ending the run
        raise RowError("", f"{name} raised {plugins.described(error, of=function)}") from error
    if isinstance(made, Conversation):
        return conversation(made.messages, tools=made.tools, column=name)
    if isinstance(made, Preference):
        parts = {"chosen": made.chosen, "rejected": made.rejected}
        return Preference(**{side: _side(part, side, name) for side, part in parts.items()})
    if isinstance(made, str):
        made = Text(made)
    if isinstance(made, Text):
        if not made.text.strip():
            raise RowError("", f"{name} returned an empty string", "remove the row")
        return made
    if not isinstance(made, list | tuple):
        raise RowError("", f"{name} returned {type(made).__name__}", _RETURNS)
    if not made:
        raise RowError("", f"{name} returned an empty list", "remove the row")
    if all(isinstance(message, Message) for message in made):
        return conversation(made, column=name)
    return conversation(read_messages(made, column=name), column=name)


def _side(part: Any, side: str, name: str) -> Conversation:
    """One of the two conversations of a preference."""
    if not isinstance(part, Conversation):
        raise RowError("", f"{name}: {side} is {type(part).__name__}", "it must be a Conversation")
    return conversation(part.messages, tools=part.tools, column=f"{name}: {side}")
