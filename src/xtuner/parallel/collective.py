"""Wraps collective calls: the others see that this process waits, and errors are reported in plain
words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.errors import PeerLostError, first_line
from xtuner.parallel import activity


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Report in plain words that another process ended; that process's message has the reason.

    Args:
        what: What the processes do together.
    """
    try:
        with activity.in_call(what):
            yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _peer_lost(error) from error


@contextmanager
def collective_layers() -> Iterator[None]:
    """As `waiting`, for code whose layers communicate: other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerLostError) or not _is_of_connection(error):
            raise
        raise _peer_lost(error) from error


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether a backend lost a connection. NCCL's errors have a type, gloo's do not."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


def _peer_lost(error: RuntimeError) -> PeerLostError:
    return PeerLostError(
        f"another process of this run ended, so this one cannot continue ({first_line(error)}): "
        "see its message. Earlier checkpoints are untouched; continue with --resume"
    )
