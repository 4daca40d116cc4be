"""Render samples as the model sees them, with supervised tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageLayout
from xtuner.types import IGNORE_INDEX, IMAGE, Sample

_SUPERVISED = "bold green"
_UNSUPERVISED = "dim"
_IMAGE = "cyan"
_NUMBERS = ("input_ids", "labels")


def draw(
    sample: Sample,
    show: str,
    *,
    tokenizer: Any,
    marks: bool,
    image_layout: ImageLayout | None = None,
) -> Text:
    """Render one sample.

    Args:
        show: 'text'; 'masked_text', which shows only the number of unsupervised tokens;
            'input_ids'; or 'labels' as passed to the loss.
        tokenizer: Decodes ids.
        marks: Put supervised tokens between « and », for output without colors. A loss weight other
            than 1 follows the tokens, such as ``(x0.5)``.
        image_layout: How images are expanded to tokens; the tokens of an image are rendered as its
            name.
    """
    output, images = Text(), iter(sample.images)
    for supervised, weight, start, stop in _spans(sample, image_layout):
        if image_layout and sample.images and sample.input_ids[start] == image_layout.token_id:
            while start < stop and (ref := next(images, None)):
                label = visible(f"[{IMAGE} {ref.name}: {ref.num_tokens} tokens]")
                output.append(label + (" " if show in _NUMBERS else ""), style=_IMAGE)
                start += ref.num_tokens
            continue
        if show == "masked_text" and not supervised:
            unit = "token" if stop - start == 1 else "tokens"
            output.append(f"[… {stop - start} {unit} …]", style=_UNSUPERVISED)
            continue
        if show == "labels" and not supervised:
            span = " ".join([str(IGNORE_INDEX)] * (stop - start))
        elif show in _NUMBERS:
            span = " ".join(map(str, sample.input_ids[start:stop].tolist()))
        else:
            span = visible(_text(sample, start, stop, tokenizer))
        if supervised and marks:
            span = f"«{span}»"
        if supervised and weight != 1:
            span += f"(x{weight:g})"
        output.append(span, style=_SUPERVISED if supervised else _UNSUPERVISED)
        if show in _NUMBERS:
            output.append(" ")
    output.rstrip()
    return output


def visible(text: str) -> str:
    """Replace control characters, which a terminal would execute, by visible symbols."""
    return "".join(_symbol(c) if c < " " or "\x7f" <= c <= "\x9f" else c for c in text)


def _symbol(control: str) -> str:
    if control in "\n\t":
        return control
    code = ord(control)
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\ufffd"


def _spans(
    sample: Sample, image_layout: ImageLayout | None
) -> Iterator[tuple[bool, float, int, int]]:
    """(supervised, weight, start, stop) of each run of tokens that have these in common; image
    tokens are separate runs."""
    labels = concatenate([sample]).labels[0].numpy()
    is_image = sample.input_ids == (image_layout.token_id if image_layout and sample.images else -1)
    start = 0
    supervised = labels != IGNORE_INDEX
    weights = np.where(supervised, 1.0 if sample.weights is None else sample.weights, 1.0)
    kinds = zip(supervised.tolist(), is_image.tolist(), weights.tolist(), strict=True)
    for (learned, _, weight), run in groupby(kinds):
        stop = start + len(list(run))
        yield learned, weight, start, stop
        start = stop


def _text(sample: Sample, start: int, stop: int, tokenizer: Any) -> str:
    """The text that tokens ``[start, stop)`` add to the text of the tokens before them."""
    ids = sample.input_ids.tolist()
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefix: str = tokenizer.decode(ids[:start], **options) if start else ""
    text: str = tokenizer.decode(ids[:stop], **options)
    if text.startswith(prefix):
        return text[len(prefix) :]
    alone: str = tokenizer.decode(ids[start:stop], **options)  # `start` is inside a character
    return alone
