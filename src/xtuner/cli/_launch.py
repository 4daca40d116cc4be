"""The options of `xtuner train` that start several processes, and what they do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from xtuner.errors import LaunchError
from xtuner.parallel.cluster import Cluster, joined_by_slurm
from xtuner.parallel.launch import RESUME, last_checkpoint_changes, launch
from xtuner.parallel.parent import LAUNCHER, end_with_parent

Nproc = Annotated[
    int,
    typer.Option(envvar="NPROC_PER_NODE", min=1, help="Processes on this machine, one per GPU."),
]
Nnodes = Annotated[int, typer.Option(envvar="NNODES", min=1, help="Machines that train together.")]
NodeRank = Annotated[
    str,
    typer.Option(envvar="NODE_RANK", metavar="N", help="Index of this machine, from 0."),
]
MasterAddr = Annotated[
    str | None,
    typer.Option(envvar=["ADDR", "MASTER_ADDR"], metavar="HOST", help="Address of machine 0."),
]
MasterPort = Annotated[
    str | None,
    typer.Option(
        envvar=["PORT", "MASTER_PORT"], metavar="PORT", help="Port of machine 0. Default: 29500."
    ),
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="[none|pytorch|slurm]",
        help="What started the processes: srun (slurm), or torchrun (pytorch; detected as well).",
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="If a process dies, restart all from the last checkpoint, up to this many times.",
    ),
]


def join(launcher: str | None, cluster: Cluster) -> None:
    """Join the processes that a launcher started, if one started this process.

    Raises:
        LaunchError: The named launcher did not start it, or an unnamed one did.
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
    """Refuse tasks of srun: without --launcher slurm each would train by itself."""
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
    """Whether this process was restarted, to continue from the last checkpoint."""
    return os.environ.get(RESUME) == "1"


def start(cluster: Cluster, *, max_restarts: int, work_dir: Path) -> int:
    """Start the processes of this node with this process's command line; return the exit code."""
    again = [sys.executable, "-m", "xtuner.cli.app", *sys.argv[1:]]
    if not max_restarts:
        return launch(again, cluster)
    from xtuner.engine.checkpoint import LAST_FILE

    changed = last_checkpoint_changes(work_dir / LAST_FILE)
    return launch(again, cluster, max_restarts=max_restarts, can_resume=changed)
