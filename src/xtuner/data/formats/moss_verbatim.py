"""Dialogues of moss-003-sft including their markers, for the template 'verbatim'.

As in XTuner 0.x, everything is supervised, including user turns, except the meta instruction and
the results of tools. `reader` replaces the name MOSS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from xtuner.data.formats.base import Format, RowError, conversation, kind, text
from xtuner.types import Conversation, Message, Row

_RESULTS = "Tool Responses"
_OPENING, _CLOSING = "<|Results|>:", "<eor>\n"


def reader(name: str = "MOSS") -> Callable[[Row], Conversation]:
    """Return a function that converts rows and replaces MOSS by `name`."""

    def convert(row: Row) -> Conversation:
        messages = [Message("system", text(row, "meta_instruction"))]
        content = ""
        for piece, supervised in _pieces(row):
            if supervised:
                content += piece
                continue
            messages += [Message("assistant", content), Message("user", piece)]
            content = ""
        messages += [Message("assistant", content)] if content else []
        named = [Message(m.role, m.content.replace("MOSS", name)) for m in messages]
        return conversation(named, column="chat")

    return convert


def _pieces(row: Row) -> Iterator[tuple[str, bool]]:
    """The texts of all turns in order, and whether each is supervised."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping) or "turn_1" not in chat:
        raise RowError("chat", f"is {kind(chat)}", "it must be an object with turn_1, turn_2, ...")
    number = 1
    while isinstance(turn := chat.get(f"turn_{number}"), Mapping):
        for part, value in turn.items():
            within = f"chat.turn_{number}."
            content = text({part: value}, part, within=within)
            inner = content.removeprefix(_OPENING).removesuffix(_CLOSING)
            if part == _RESULTS and content == f"{_OPENING}{inner}{_CLOSING}" and inner:
                yield from ((_OPENING, True), (inner, False), (_CLOSING, True))
            else:
                yield content, True
        number += 1


FORMAT = Format(
    name="moss_verbatim",
    description="Like moss, with markers; everything except tool results is supervised.",
    columns=("meta_instruction", "chat"),
    example={
        "meta_instruction": "You are MOSS.\n",
        "chat": {
            "turn_1": {
                "Human": "[Human]: What is 2 + 3?\n",
                "Commands": "[Commands]: add(2, 3)\n",
                "Tool Responses": "[Results]: 5\n",
                "MOSS": "[MOSS]: 5.\n",
            }
        },
    },
    convert=reader(),
    priority=-1,
)
