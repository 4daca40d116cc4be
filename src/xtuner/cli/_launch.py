"""The options of `xtuner train` that start several processes, and what is done about them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from xtuner.errors import LaunchError
from xtuner.parallel.cluster import Cluster, joined_by_slurm
from xtuner.parallel.launch import RESUME, last_checkpoint_changes, launch
from xtuner.parallel.parent import LAUNCHER, end_with_parent

Launcher = Literal["none", "pytorch", "slurm"]

Nproc = Annotated[
    int,
    typer.Option(envvar="NPROC_PER_NODE", min=1, help="Processes on this machine, one per GPU."),
]
Nnodes = Annotated[int, typer.Option(envvar="NNODES", min=1, help="Machines that train together.")]
NodeRank = Annotated[
    str,
    typer.Option(envvar="NODE_RANK", metavar="N", help="Number of this machine, from 0."),
]
MasterAddr = Annotated[
    str | None,
    typer.Option(envvar=["ADDR", "MASTER_ADDR"], metavar="HOST", help="Address of machine 0."),
]
MasterPort = Annotated[
    str | None,
    typer.Option(
        envvar=["PORT", "MASTER_PORT"], metavar="PORT", help="Port of machine 0 [default: 29500]."
    ),
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="[none|pytorch|slurm]",
        help="Who started the processes: srun (slurm), or torchrun (pytorch; noticed by itself).",
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0, help="Start the processes again so often if one dies, from the last checkpoint."
    ),
]


def join(launcher: str | None, cluster: Cluster) -> None:
    """Take the place that a launcher gave this process, if one started it.

    Raises:
        LaunchError: the launcher that is named did not start it, or one that is not named did.
    """
    if launcher not in (None, "none", "pytorch", "slurm"):
        raise typer.BadParameter(f"--launcher {launcher}: must be none, pytorch or slurm")
    if LAUNCHER in os.environ:
        end_with_parent()
    elif launcher == "slurm":
        os.environ |= joined_by_slurm(os.environ)
    elif launcher == "none":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    elif launcher == "pytorch" and "RANK" not in os.environ and cluster.world_size == 1:
        raise LaunchError(
            "--launcher pytorch: this process was not started by torchrun (RANK is not set). "
            "Use `torchrun --nproc-per-node N -m xtuner.cli.app train ...`, or let xtuner start "
            "them: NPROC_PER_NODE=N xtuner train ..."
        )
    elif launcher is None and "RANK" not in os.environ and cluster.world_size == 1:
        _refuse_tasks()


def _refuse_tasks() -> None:
    """srun starts every task alike; without --launcher slurm each would train for itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks not in ("", "1"):
        raise LaunchError(
            f"srun started {tasks} tasks, and each would train by itself: add --launcher slurm, or "
            "start one task"
        )


def started_by_launcher() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ


def world_size(cluster: Cluster) -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if started_by_launcher() else cluster.world_size


def has_to_resume() -> bool:
    """Whether this process was started again, to go on from the last checkpoint."""
    return os.environ.get(RESUME) == "1"


def start(cluster: Cluster, *, max_restarts: int, work_dir: Callable[[], Path]) -> int:
    """Start the processes of this node with this process's command line; return the exit code."""
    again = [sys.executable, "-m", "xtuner.cli.app", *sys.argv[1:]]
    if not max_restarts:
        return launch(again, cluster)
    from xtuner.engine.checkpoint import LAST_FILE

    changed = last_checkpoint_changes(work_dir() / LAST_FILE)
    return launch(again, cluster, max_restarts=max_restarts, can_resume=changed)
