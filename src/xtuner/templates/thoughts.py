"""How models mark their thoughts: ``<think>...</think>`` and the like."""

from __future__ import annotations

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What opens a thought, and what closes it."""


def open_thought(opener: str) -> tuple[str, str] | None:
    """The tags of the thought that a prompt ending with `opener` leaves open, if any."""
    ended = opener.rstrip()
    return next((tags for tags in THOUGHT_TAGS if ended.endswith(tags[0])), None)


def split_thought(content: str) -> tuple[str, str]:
    """The thought at the start of `content` and what follows it; the first is empty if there is
    none. The tag that opens the thought may be missing: prompts end with it."""
    for begin, end in THOUGHT_TAGS:
        thought, found, rest = content.partition(end)
        if found and (begin not in thought or thought.lstrip().startswith(begin)):
            return thought.strip().removeprefix(begin).strip(), rest.lstrip("\n")
    return "", content


def without_empty_thought(answer: str) -> str:
    """`answer` without an empty thought, or the beginning of one, at its start."""
    text = answer.lstrip()
    for begin, end in THOUGHT_TAGS:
        if text.startswith(begin):
            inside, found, rest = text.removeprefix(begin).partition(end)
            if not found:
                return inside.lstrip()
            if not inside.strip():
                return rest.lstrip()
    return answer


def without_thought_at_end(header: str) -> str:
    """`header` without a thought that begins or ends at its end; such a thought is empty."""
    text = header.rstrip()
    for begin, end in THOUGHT_TAGS:
        if text.endswith(end):
            before = text.removesuffix(end)
            return before.rstrip().removesuffix(begin) if begin in before else before
        if text.endswith(begin):
            return text.removesuffix(begin)
    return header
