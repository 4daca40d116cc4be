"""Read the keys of a turn that control supervision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.data.formats.base import RowError, optional_text
from xtuner.types import Role

LOSS_KEYS = ("loss", "train", "training", "weight")
"""Keys for whether a turn is supervised: ours, Axolotl's two, and OpenAI's."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys for the reasoning before an answer, as in DeepSeek, vLLM and gpt-oss."""

SUPERVISION_KEYS = (*LOSS_KEYS, *REASONING_KEYS)


def read_loss(turn: Mapping[str, Any], role: Role, path: str) -> bool | None:
    """Read whether a turn is supervised; None if it does not say.

    Raises:
        RowError: a value is neither true nor false, two of them disagree, or a turn that is not
            the assistant's is to be supervised.
    """
    given = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise RowError(f"{path}{key}", f"is {value!r}", "it must be true or false")
        if value and role != "assistant":
            hint = "only assistant turns are supervised"
            raise RowError(f"{path}{key}", f"is true in a turn of {role!r}", hint)
    if len({bool(value) for value in given.values()}) > 1:
        names = " and ".join(given)
        raise RowError(f"{path}{next(iter(given))}", f"{names} disagree", "keep one of them")
    return next((bool(value) for value in given.values()), None)


def read_reasoning(turn: Mapping[str, Any], role: Role, path: str) -> str:
    """Read the reasoning of an assistant turn; empty if there is none.

    Raises:
        RowError: it is not text, is given twice, or belongs to a turn of another role.
    """
    given = {key: optional_text(turn, key, within=path) for key in REASONING_KEYS}
    given = {key: value for key, value in given.items() if value.strip()}
    if not given:
        return ""
    key = next(iter(given))
    if role != "assistant":
        raise RowError(
            f"{path}{key}", f"is in a turn of {role!r}", "only assistant turns have reasoning"
        )
    if len({*given.values()}) > 1:
        raise RowError(f"{path}{key}", f"{' and '.join(given)} differ", "keep one of them")
    return given[key]
