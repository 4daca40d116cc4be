"""Rules that hold for all tests; tests/conftest.py enforces them."""

import re

LONGEST_ID = 200
NO_CONSTANT = re.compile(r"[^ -~]|\\x|0x[0-9a-f]{6}| object at |/tmp/|pytest-of-")
"""What a test id must not have in it: binary data, addresses, places of one run."""


def wants_gpu(expression):
    """Whether the marker expression of ``-m`` selects tests by the marker `gpu`."""
    return re.search(r"(?<!not )\bgpu\b", expression) is not None


def id_faults(ids):
    """Those of the ids that may change from run to run, are too long, or are there twice."""
    seen = set()
    return [
        name
        for name in ids
        if NO_CONSTANT.search(name) or len(name) > LONGEST_ID or name in seen or seen.add(name)
    ]
