"""`xtuner train`."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _launch, _settings, _strategy
from xtuner.cli._heartbeat import heartbeat
from xtuner.config.load import LoadedSettings
from xtuner.errors import shell_command
from xtuner.parallel.cluster import Cluster, is_first_process


def command(
    config: _settings.Config,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Default: the setting work_dir, otherwise work_dirs/NAME."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[iter_N|auto]",
            help="Resume from the newest checkpoint of the work dir, or from this one; auto starts "
            "from the beginning if there is none.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete checkpoints of an earlier run in the work dir."),
    ] = False,
    overrides: _settings.Overrides = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait while another run writes to the work dir."),
    ] = False,
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate",
            help="CONFIG is a config of XTuner 0.x, LLaMA-Factory or torchtune; migrate it first.",
        ),
    ] = False,
    nproc: _launch.Nproc = 1,
    nnodes: _launch.Nnodes = 1,
    node_rank: _launch.NodeRank = "0",
    master_addr: _launch.MasterAddr = None,
    master_port: _launch.MasterPort = None,
    launcher: _launch.LauncherOption = None,
    max_restarts: _launch.MaxRestarts = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate memory without training.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="With --dry-run: plan for a device of this size, e.g. 8GB."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="[cpu|cuda]",
            help="Same as --set device=...; with --dry-run --memory SIZE, cuda needs no GPU.",
        ),
    ] = None,
    strategy: _strategy.Strategy = None,
    deepspeed: _strategy.Deepspeed = None,
    trust_remote_code: _settings.TrustRemoteCode = False,
    trust_code: _settings.TrustCode = False,
) -> None:
    """Fine-tune a model."""
    cluster = Cluster.of(nproc, nnodes, node_rank=node_rank, address=master_addr, port=master_port)
    _launch.join(launcher, cluster)
    if _launch.has_to_resume():
        resume, overwrite = "last", False
    old = Path(config) if migrate else None
    if old is not None:
        config = _migrated(config)
    overrides = [*(overrides or ()), *_as_overrides(device, strategy, deepspeed)]
    loaded = _settings.load(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=trust_code
    )
    if memory and not dry_run:
        raise typer.BadParameter("--memory requires --dry-run")
    if dry_run:
        with heartbeat(first="Loading..."):
            fits = _fits(loaded, memory, processes=nproc)
        raise typer.Exit(0 if fits else 2)
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite cannot be combined")
    folder = loaded.work_dir(work_dir)
    _check(loaded, _launch.world_size(cluster))
    if not _launch.started_by_launcher():
        if cluster.node_rank == 0 and not wait:
            _check_folder(folder, loaded, resume=resume, overwrite=overwrite)
        print("Loading torch and transformers...", flush=True)
    _set_up(loaded)
    if not _launch.started_by_launcher():
        if wait:
            from xtuner.engine.run_lock import wait_until_free

            wait_until_free(folder)
        if cluster.world_size > 1 or max_restarts:
            raise typer.Exit(_launch.start(cluster, max_restarts=max_restarts, work_dir=folder))
    _settings.remember_work_dir(folder)

    again = ["xtuner", "train", config, *(["--work-dir", str(work_dir)] if work_dir else [])]
    again += [word for override in overrides or () for word in ("--set", override)]
    again += ["--nproc", str(nproc)] if nproc > 1 else []
    again += ["--max-restarts", str(max_restarts)] if max_restarts else []
    again += ["--launcher", launcher] if launcher else []
    again += ["--trust-code"] if trust_code else []
    with heartbeat(on=is_first_process()):
        importlib.import_module("xtuner.training.run")
    with heartbeat(on=not sys.stdout.isatty() and is_first_process()):
        _train(loaded, work_dir, resume=resume, overwrite=overwrite, wait=wait, again=again)
    if old is not None:
        _keep(old, folder)


def _train(
    loaded: LoadedSettings,
    work_dir: Path | None,
    *,
    resume: str | None,
    overwrite: bool,
    wait: bool,
    again: list[str],
) -> None:
    """Train in this process; `again` is the command to continue after an interruption."""
    from xtuner.engine.signals import Interrupted
    from xtuner.training.run import train

    try:
        train(loaded, work_dir=work_dir, resume=resume, overwrite=overwrite, wait=wait)
    except Interrupted as stopped:
        words = [*again, *(["--resume"] if stopped.can_resume else [])]
        print(f"\n{stopped} Continue with:\n  {shell_command(*words)}", file=sys.stderr)
        raise typer.Exit(130) from None


def _fits(loaded: LoadedSettings, memory: str | None, *, processes: int) -> bool:
    """Print the memory forecast; return whether the run fits."""
    from xtuner.memory.available import parse_memory
    from xtuner.training.dry_run import dry_run

    given = None if memory is None else parse_memory(memory)
    return dry_run(loaded, memory=given, processes=processes)


def _check(loaded: LoadedSettings, world_size: int) -> None:
    """Check what can be checked without torch."""
    if loaded.settings.sequence_parallel_size > 1:
        from xtuner.parallel.sequence_check import check_sequence_parallel

        check_sequence_parallel(loaded.settings, world_size)
    if _launch.started_by_launcher():
        return
    from xtuner.training.first_check import first_check

    print(f"Checking {loaded.name}: settings, data, model", flush=True)
    first_check(loaded)


def _check_folder(
    folder: Path, loaded: LoadedSettings, *, resume: str | None, overwrite: bool
) -> None:
    """Check that no other run uses the work dir, and what an earlier one left there."""
    from xtuner.engine import earlier_run
    from xtuner.engine.run_lock import refuse_if_held

    refuse_if_held(folder)
    if not resume and not overwrite:
        earlier_run.refuse_earlier_run(folder)
    if resume == earlier_run.LAST:
        earlier_run.refuse_nothing_to_resume(folder, loaded)


def _set_up(loaded: LoadedSettings) -> None:
    """Set what torch reads from the environment when it is imported."""
    from xtuner.device.environment import set_up_memory, set_up_threads

    set_up_threads()
    set_up_memory(loaded.settings.device)


def _as_overrides(device: str | None, strategy: str | None, deepspeed: str | None) -> list[str]:
    """The options that are shorthand for ``--set``."""
    chosen = _strategy.chosen(strategy, deepspeed)
    given = {"device": device, "strategy": chosen or None}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def _keep(old: Path, work_dir: Path) -> None:
    """Copy the old config to `work_dir`, where scripts for XTuner 0.x look for it."""
    if is_first_process() and not (work_dir / old.name).exists():
        shutil.copyfile(old, work_dir / old.name)


def _migrated(config: str) -> str:
    """Convert `config` to a settings file and return its name."""
    from xtuner.migrate.file import migrate

    done = migrate(Path(config))
    if is_first_process():
        typer.echo(f"Migrated {config} to {done.path}")
        for line in done.draft.report():
            typer.echo(line)
    return str(done.path)
