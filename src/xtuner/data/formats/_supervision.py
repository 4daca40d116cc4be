"""Read the keys of a turn that control supervision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from xtuner.data.formats.base import RowError, optional_text
from xtuner.types import Role

WEIGHT_KEYS = ("weight", "loss_weight")
"""Keys for the loss weight of a turn: OpenAI's name, and a longer one."""

LOSS_KEYS = ("loss", "train", "training", *WEIGHT_KEYS)
"""Keys for whether a turn is supervised: ours, Axolotl's two, and the weights, where 0 means no."""

_LEAST, _MOST = 1e-6, 1e6

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys for the reasoning before an answer, as in DeepSeek, vLLM and gpt-oss."""

SUPERVISION_KEYS = (*LOSS_KEYS, *REASONING_KEYS)


class Supervision(TypedDict):
    """The loss settings of a turn, as fields of a `Message`."""

    loss: bool | None
    weight: float


def read_loss(turn: Mapping[str, Any], role: Role, path: str) -> Supervision:
    """Read whether a turn is supervised, None if it does not say, and its loss weight.

    Raises:
        RowError: A value is not allowed, two of them disagree, or a turn that is not the
            assistant's is to be supervised.
    """
    given = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if key in WEIGHT_KEYS:
            _check_weight(key, value, path)
        elif value not in (0, 1):
            raise RowError(f"{path}{key}", f"is {value!r}", "it must be true or false")
        if value and role != "assistant":
            hint = "only assistant turns are supervised"
            seen = value if key in WEIGHT_KEYS and value is not True else "true"
            raise RowError(f"{path}{key}", f"is {seen} in a turn of {role!r}", hint)
    weights = {float(given[key]) for key in WEIGHT_KEYS if key in given}
    if len({bool(value) for value in given.values()}) > 1 or len(weights) > 1:
        names = " and ".join(given)
        raise RowError(f"{path}{next(iter(given))}", f"{names} disagree", "keep one of them")
    loss = next((bool(value) for value in given.values()), None)
    return Supervision(loss=loss, weight=next(iter(weights), 1.0) if loss else 1.0)


def _check_weight(key: str, value: Any, path: str) -> None:
    number = isinstance(value, int | float)
    if not number or (value and not _LEAST <= value <= _MOST):
        hint = f"it must be 0, or a number from {_LEAST:g} to {_MOST:g}"
        raise RowError(f"{path}{key}", f"is {value!r}", hint)


def read_reasoning(turn: Mapping[str, Any], role: Role, path: str) -> str:
    """Read the reasoning of an assistant turn; empty if there is none.

    Raises:
        RowError: It is not text, is given twice, or belongs to a turn of another role.
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
