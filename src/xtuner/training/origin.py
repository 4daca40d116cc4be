"""What a run starts from: the base model, a checkpoint to resume, or old weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from xtuner.config.load import LoadedSettings
from xtuner.config.schema import Settings
from xtuner.convert import old_checkpoint
from xtuner.engine import earlier_run, run_lock
from xtuner.engine.best import BestMetric
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.earlier_run import AUTO, LAST, refuse_nothing_to_resume
from xtuner.engine.hooks.base import Run
from xtuner.engine.resume import check_shape
from xtuner.hub import old_pth
from xtuner.models import manifest
from xtuner.parallel.once import Once, check_shared
from xtuner.parallel.processes import Processes


@dataclass(frozen=True)
class Origin:
    """What a run starts from.

    Attributes:
        folder: The weights to load; None starts from the base model.
        resuming: `folder` is a checkpoint of this run, with optimizer state and step.
    """

    folder: Path | None = None
    resuming: bool = False


@contextmanager
def claimed_work_dir(
    loaded: LoadedSettings,
    work_dir: Path,
    processes: Processes,
    *,
    resume: str | None,
    overwrite: bool,
    wait: bool,
) -> Iterator[str | None]:
    """Hold the lock of the work dir, and yield what the run resumes: `resume`, or None if it is
    'last' or 'auto' and there is no checkpoint. The arguments are those of `run.train`.

    Raises:
        LaunchError: Another run holds the lock and `wait` is False.
        CheckpointError: An earlier run is in the way, or there is nothing to resume.
    """
    is_empty = False
    with ExitStack() as held:

        def claim() -> None:
            nonlocal is_empty
            if resume == LAST and not work_dir.exists():
                refuse_nothing_to_resume(work_dir, loaded)
            held.enter_context(run_lock.hold(work_dir, wait=wait))
            is_empty = earlier_run.claim(work_dir, loaded, resume=resume, overwrite=overwrite)

        # What the others find in the work dir is what this run finds once it holds the lock.
        Once(processes, work_dir).on_main("lock", claim)
        check_shared(processes, work_dir)
        # The others may see the folder of a network file system with a delay, so they do not look.
        (anew,) = processes.sum([float(is_empty)])
        if not anew or resume not in (LAST, AUTO):
            yield resume
            return
        if processes.is_main:
            print(f"{work_dir} contains no checkpoint: starting from the beginning.")
        yield None


@contextmanager
def open_origin(
    resume: str | None,
    settings: Settings,
    store: CheckpointStore,
    *,
    is_main: bool,
    console: Console,
) -> Iterator[Origin]:
    """Yield what the run starts from; weights of XTuner 0.x are in a temporary folder.

    Args:
        resume: 'last', 'auto', the name of a checkpoint in the work dir, or a .pth of XTuner 0.x.
        store: The checkpoints of the work dir.
        is_main: Whether this process checks that the checkpoint is complete.
        console: For a note.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete, or does not fit the settings.
    """
    if not resume:
        yield Origin()
        return
    if not old_pth.is_old(old := Path(resume).expanduser()):
        source = store.find(None if resume in (LAST, AUTO) else resume)
        if is_main:
            manifest.check(source, resuming=True)
        check_shape(source, settings)
        yield Origin(source, resuming=True)
        return
    store.work_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".xtuner-", dir=store.work_dir) as temporary:
        folder = Path(temporary) / old.stem
        old_checkpoint.write_folder(old, settings, folder)
        console.print(
            f"Note: {old} is an XTuner 0.x checkpoint: the run starts from its weights, at step 0 "
            "with a new optimizer.",
            markup=False,
        )
        yield Origin(folder)


def nothing_to_do(run: Run, best: BestMetric) -> str:
    """Why a resumed run has ended already, and what continues it; empty if it has not."""
    if run.step >= run.total_steps:
        return (
            f"is at step {run.step} of {run.total_steps}. To continue, raise max_epochs or "
            "max_steps"
        )
    if best.exhausted:
        return (
            f"ended early at step {run.step}: {best.reason()}. To continue, raise "
            "early_stopping_patience"
        )
    return ""
