"""Rules that hold for all tests; tests/conftest.py enforces them."""

import re

LONGEST_ID = 200
NO_CONSTANT = re.compile(r"[^ -~]|\\x|0x[0-9a-f]{6}| object at |/tmp/|pytest-of-")
"""What a test id must not contain: binary data, addresses, paths of one run."""


def wants_gpu(expression):
    """Whether the marker expression of ``-m`` selects tests by the marker `gpu`."""
    return re.search(r"(?<!not )\bgpu\b", expression) is not None


def id_faults(ids):
    """The ids that may change between runs, are too long, or occur twice."""
    seen = set()
    return [
        name
        for name in ids
        if NO_CONSTANT.search(name) or len(name) > LONGEST_ID or name in seen or seen.add(name)
    ]
