"""Checks before training whether the model knows the language of the data, from two numbers.

Bytes per token show whether the tokenizer knows the script: 3.5 to 5 for its main languages, below
2.2 if characters are split into pieces. The initial loss, in bits per byte of text, shows whether
the model can predict such text: about 1 for a language that it knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.types import Batch, Sample

FIRST_SAMPLES = 4
"""Number of samples of the first pack that are examined."""
FEW_BYTES = 2.2
MANY_BITS = 2.5
_SHARE = 0.3
_SCRIPTS = {
    "zh": (("一", "鿿"),),
    "ja": (("぀", "ヿ"),),
    "ko": (("가", "힣"),),
    "ru": (("Ѐ", "ӿ"),),
    "ar": (("؀", "ۿ"),),
    "hi": (("ऀ", "ॿ"),),
    "th": (("฀", "๿"),),
    "el": (("Ͱ", "Ͽ"),),
    "he": (("֐", "׿"),),
}
_NAMES = {
    "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "ru": "Cyrillic", "ar": "Arabic",
    "hi": "Devanagari", "th": "Thai", "el": "Greek", "he": "Hebrew",
}  # fmt: skip


def language_of(text: str) -> str:
    """The script of most letters in `text`, as a language code; 'en' for Latin."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return "en"
    shares = {
        code: sum(low <= letter <= high for letter in letters for low, high in ranges)
        for code, ranges in _SCRIPTS.items()
    }
    if shares["ja"] > 0.1 * len(letters):  # Japanese also uses Chinese characters
        return "ja"
    best = max(shares, key=lambda code: shares[code])
    return best if shares[best] > _SHARE * len(letters) else "en"


def script_note(samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> str:
    """A note if the tokenizer hardly knows the script of `samples`; otherwise empty."""
    ids = [token for sample in samples for token in _supervised(sample)]
    text = decode(ids)
    code = language_of(text)
    if code == "en" or not ids or len(text.encode()) / len(ids) >= FEW_BYTES:
        return ""
    characters = max(1, len(text))
    return (
        f"the tokenizer needs {len(ids) / characters:.1f} tokens per character of these rows: "
        f"this model hardly knows {_NAMES[code]} script. It may learn these rows by heart, but "
        f"will answer other questions poorly. Choose a model that knows it{_KNOWN.get(code, '')}"
    )


_KNOWN = {"zh": ", such as Qwen3 or InternLM (`xtuner list-cfg -p qwen3`)"}


def mean_loss(model: Any, batch: Batch) -> float:
    """The mean loss of the supervised tokens of `batch` ``[1, N]``, without gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        scores: Tensor = model(batch)
    model.train(was_training)
    return -float(scores.mean())


def loss_note(
    loss: float, samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]
) -> str:
    """A note if the model cannot predict the answers of `samples`; otherwise empty.

    Args:
        loss: The mean over their supervised tokens, before the first step.
        samples: The samples on which it was measured.
        decode: Token ids to text.
    """
    ids = [token for sample in samples for token in _supervised(sample)]
    size = len(decode(ids).encode())
    if not size:
        return ""
    bits = loss * len(ids) / math.log(2) / size
    if bits < MANY_BITS:
        return ""
    return (
        f"the loss before training is {loss:.2f} ({bits:.1f} bits per byte; text in a language "
        f"that a model knows takes about 1): the model hardly knows the language of these rows, "
        f"or they are not text. Expect poor results"
    )


def _supervised(sample: Sample) -> list[int]:
    ids: list[int] = sample.input_ids[sample.loss_mask].tolist()
    return ids
