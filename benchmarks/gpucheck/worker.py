"""The process that runs parts: names of parts on stdin, one JSON message per line on stdout.

Everything that is printed goes to stderr, so that stdout has only messages.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from typing import IO, Any

from gpucheck.plan import BY_NAME
from gpucheck.rows import Skip


def serve(options: Any) -> None:
    """Run parts until stdin ends."""
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options.fake:
        from xtuner.testing.fake_cuda import device

        device.install(int(os.environ.get("FAKE_CUDA_MIB", 2**20)) * 2**20)
    from gpucheck.bench import Bench

    bench = Bench.of(options)
    _say(messages, {"end": "ready"})
    for line in sys.stdin:
        part = BY_NAME[line.strip()]
        module, _, name = part.function.partition(":")
        try:
            function = getattr(importlib.import_module(f"gpucheck.{module}"), name)
            for row in function(bench):
                _say(messages, {"row": row.as_dict()})
        except Skip as reason:
            _say(messages, {"skipped": str(reason)})
        except BaseException as error:  # after any error the remaining parts still run
            traceback.print_exc()
            _say(messages, {"error": _in_a_line(error)})
        gc.collect()
        bench.free()
        _say(messages, {"end": part.name})


def _in_a_line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def _say(messages: IO[str], message: dict[str, Any]) -> None:
    messages.write(json.dumps(message, default=str) + "\n")
    messages.flush()
