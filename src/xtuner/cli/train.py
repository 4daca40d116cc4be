"""`xtuner train`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[
        str, typer.Argument(help="A settings file, or the name of a built-in config.")
    ],
    work_dir: Annotated[Path | None, typer.Option(help="Where results go.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[iter_N]",
            help="Go on from the newest checkpoint of the work dir, or from this one.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete checkpoints of an earlier run in the work dir."),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "--cfg-options", metavar="KEY=VALUE", help="Override a setting; repeatable."
        ),
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(envvar="NPROC_PER_NODE", min=1, help="Processes on this machine, one a GPU."),
    ] = 1,
) -> None:
    """Fine-tune a model as a settings file says."""
    from xtuner.config.load import load_settings

    loaded = load_settings(config, overrides=overrides or ())
    if nproc > 1 and "LOCAL_RANK" not in os.environ:
        raise typer.Exit(_respawn(nproc))

    from xtuner.engine.trainer import Interrupted
    from xtuner.run import train

    try:
        train(loaded, work_dir=work_dir, resume=resume, overwrite=overwrite)
    except Interrupted as stopped:
        place = f" --work-dir {shlex.quote(str(work_dir))}" if work_dir else ""
        sets = "".join(f" --set {shlex.quote(o)}" for o in overrides or ())
        print(
            f"\n{stopped} Go on with:\n  xtuner train {shlex.quote(config)}{place}{sets} --resume",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _respawn(processes: int) -> int:
    """Run this very command in several processes under torchrun; its exit code is ours."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    child = subprocess.Popen([*launcher, "-m", "xtuner.cli.app", *sys.argv[1:]])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent Ctrl-C to the workers as well: wait for them to save
    finally:
        signal.signal(signal.SIGTERM, before)
