"""The rendezvous of a run's processes: the store and the process group.

xtuner --nproc     rank 0 hosts the store, on a socket of the loopback interface
xtuner --nnodes    node 0's launcher hosts it, on the given address
torchrun, srun     torch's own rendezvous from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from xtuner.errors import LaunchError, first_line
from xtuner.parallel.attempt import ATTEMPT, LISTENER

PATIENCE = timedelta(days=1)
"""Long, because the others wait while the main process writes a checkpoint; lost processes are
detected otherwise."""

JOIN = timedelta(minutes=10)
"""How long the processes wait for each other at startup."""


def join_group(device: str) -> None:
    """Join the process group: through our launcher's store, or through torch's own rendezvous under
    another launcher.

    Raises:
        LaunchError: The others do not join in time.
    """
    if "RANK" not in os.environ:
        # DeepSpeed's, from an earlier run of this process or of the one that started it. accelerate
        # would expect a launcher.
        os.environ.pop("LOCAL_RANK", None)
    if ATTEMPT not in os.environ or dist.is_initialized():
        return
    try:
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=client(host=os.environ.pop(LISTENER, None)),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=PATIENCE,
        )
    except RuntimeError as error:
        raise LaunchError(
            f"process {os.environ['RANK']} cannot join the others: {first_line(error)}"
        ) from error


def client(*, host: str | None = None) -> Any:
    """Open a separate connection to the run's store.

    Args:
        host: A listening socket on which this process hosts the store.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=host is not None,
        timeout=JOIN,
        wait_for_workers=False,
        master_listen_fd=None if host is None else int(host),
    )
    # Keys of an earlier attempt in node 0's store would make this one hang. torchrun's restart
    # count differs between nodes, so it is no prefix; `Processes` agree on one of their own.
    return PrefixStore(f"attempt_{os.environ.get(ATTEMPT, '0')}", store)
