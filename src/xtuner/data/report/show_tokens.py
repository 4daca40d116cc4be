"""Draw samples as the model will see them, with what is supervised marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from xtuner.data.collate import lay_out
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
    """Draw one sample.

    Args:
        sample: what to draw.
        show: 'text'; 'masked_text', where what is not supervised is only counted; 'input_ids'; or
            'labels' as the loss gets them.
        tokenizer: turns ids back into text.
        marks: put supervised text and ids between « and », for where there are no colours.
        image_layout: of a model with image input; an image is then named, once.
    """
    image, images = Text(), iter(sample.images)
    for supervised, start, stop in _spans(sample, image_layout):
        if image_layout and sample.images and sample.input_ids[start] == image_layout.token_id:
            while start < stop and (ref := next(images, None)):
                mark = visible(f"[{IMAGE} {ref.name}: {ref.num_tokens} tokens]")
                image.append(mark + (" " if show in _NUMBERS else ""), style=_IMAGE)
                start += ref.num_tokens
            continue
        if show == "masked_text" and not supervised:
            unit = "token" if stop - start == 1 else "tokens"
            image.append(f"[… {stop - start} {unit} …]", style=_UNSUPERVISED)
            continue
        if show == "labels" and not supervised:
            words = " ".join([str(IGNORE_INDEX)] * (stop - start))
        elif show in _NUMBERS:
            words = " ".join(map(str, sample.input_ids[start:stop].tolist()))
        else:
            words = visible(_text(sample, start, stop, tokenizer))
        if supervised and marks:
            words = f"«{words}»"
        image.append(words, style=_SUPERVISED if supervised else _UNSUPERVISED)
        if show in _NUMBERS:
            image.append(" ")
    image.rstrip()
    return image


def visible(text: str) -> str:
    """Replace control characters, which could command the terminal, by images of them."""
    return "".join(_image_of(c) if c < " " or "\x7f" <= c <= "\x9f" else c for c in text)


def _image_of(control: str) -> str:
    if control in "\n\t":
        return control
    code = ord(control)
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\ufffd"


def _spans(sample: Sample, image_layout: ImageLayout | None) -> Iterator[tuple[bool, int, int]]:
    """(supervised, start, stop) of each run of tokens that are, or are not, in the loss; places of
    images are runs of their own."""
    labels = lay_out([sample]).labels[0].numpy()
    seen = (
        sample.input_ids == image_layout.token_id
        if image_layout and sample.images
        else labels > labels.max()
    )
    start = 0
    kinds = zip((labels != IGNORE_INDEX).tolist(), seen.tolist(), strict=True)
    for (supervised, _), run in groupby(kinds):
        stop = start + len(list(run))
        yield supervised, start, stop
        start = stop


def _text(sample: Sample, start: int, stop: int, tokenizer: Any) -> str:
    """The text that the tokens from `start` on add to those before them."""
    ids = sample.input_ids.tolist()
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(ids[:start], **options) if start else ""
    together: str = tokenizer.decode(ids[:stop], **options)
    if together.startswith(before):
        return together[len(before) :]
    alone: str = tokenizer.decode(ids[start:stop], **options)  # a character was cut in two
    return alone
