"""Random tool calls, reproducible by a seed."""

import random

from xtuner.calls.read import make_call

TEXTS = [
    "", " ", "plain", 'a "quoted" word', "it's", "back\\slash", "line\nbreak", "tab\there",
    "你好，世界",
    "🙂👩‍👩‍👧", "</tool_call>", "<tool_call>{}", "{not json", "[1, 2", "}]}", "a; b",
    "```python\nx\n```",
    "<|im_end|>", "\u2028", "null", "3.5", "true", "<b>&amp;</b>", "Action: x", "é" * 40,
]  # fmt: skip


def make_text(rng):
    return "".join(rng.sample(TEXTS, rng.randint(1, 3)))


def make_value(rng, depth=0):
    kinds = ["text", "int", "float", "bool", "null"] + (["list", "object"] if depth < 3 else [])
    match rng.choice(kinds):
        case "text":
            return make_text(rng)
        case "int":
            return rng.randint(-(10**12), 10**12)
        case "float":
            return round(rng.uniform(-1e3, 1e3), 3)
        case "bool":
            return rng.random() < 0.5
        case "list":
            return [make_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        case "object":
            return {make_text(rng): make_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return None


def make_calls(seed, *, most=3, value=make_value):
    rng = random.Random(seed)
    names = ["get_weather", "search.web", "f", "look-up2"]
    return [
        make_call(
            rng.choice(names),
            {f"key_{i}": value(rng) for i in range(rng.randint(0, 3))},
            call_id=f"call{number:05d}",
        )
        for number in range(rng.randint(1, most))
    ]


def pieces_of(text, rng):
    """`text` cut at random places, as tokens would come."""
    at, pieces = 0, []
    while at < len(text):
        size = rng.randint(1, 7)
        pieces.append(text[at : at + size])
        at += size
    return pieces
