"""Dialogues of moss-003-sft as they are written, markers and all, for the template 'verbatim'.

As in XTuner 0.x everything is learned, what the user says included, but for the meta instruction
and the results of tools. A name other than MOSS comes with `reader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from xtuner.data.formats.base import Format, RowError, conversation, kind, text
from xtuner.types import Conversation, Message, Row

_RESULTS = "Tool Responses"
_OPENING, _CLOSING = "<|Results|>:", "<eor>\n"


def reader(name: str = "MOSS") -> Callable[[Row], Conversation]:
    """A function that reads rows and writes `name` in the place of MOSS."""

    def convert(row: Row) -> Conversation:
        messages = [Message("system", text(row, "meta_instruction"))]
        learnt = ""
        for piece, counts in _pieces(row):
            if counts:
                learnt += piece
                continue
            messages += [Message("assistant", learnt), Message("user", piece)]
            learnt = ""
        messages += [Message("assistant", learnt)] if learnt else []
        named = [Message(m.role, m.content.replace("MOSS", name)) for m in messages]
        return conversation(named, column="chat")

    return convert


def _pieces(row: Row) -> Iterator[tuple[str, bool]]:
    """The texts of all turns in order, and whether each is learned."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping) or "turn_1" not in chat:
        raise RowError("chat", f"is {kind(chat)}", "it must be an object with turn_1, turn_2, ...")
    number = 1
    while isinstance(turn := chat.get(f"turn_{number}"), Mapping):
        for part, said in turn.items():
            within = f"chat.turn_{number}."
            said = text({part: said}, part, within=within)
            inside = said.removeprefix(_OPENING).removesuffix(_CLOSING)
            if part == _RESULTS and said == f"{_OPENING}{inside}{_CLOSING}" and inside:
                yield from ((_OPENING, True), (inside, False), (_CLOSING, True))
            else:
                yield said, True
        number += 1


FORMAT = Format(
    name="moss_verbatim",
    description="As moss, markers and all; all but results of tools is learned.",
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
