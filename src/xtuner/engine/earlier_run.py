"""A run does not mix its checkpoints with those of an earlier run, and a resumed one does not start
anew in a wrong folder. Imports no torch, so that the command can check this first.
"""

from __future__ import annotations

from pathlib import Path

from xtuner.config.load import LoadedSettings
from xtuner.engine.kept_settings import are_kept, keep_settings
from xtuner.errors import CheckpointError
from xtuner.models.folder_swap import recover
from xtuner.models.references import checkpoints_in

LAST = "last"
"""Resume from the newest checkpoint."""
AUTO = "auto"
"""Resume from the newest checkpoint; start from the beginning if there is none."""


def refuse_earlier_run(work_dir: Path) -> None:
    """Raise CheckpointError if `work_dir` contains checkpoints."""
    if found := checkpoints_in(work_dir):
        raise CheckpointError(
            f"{work_dir} contains {found[-1].name} of an earlier run. Add --resume to continue "
            "it, --work-dir DIR to use another folder, or --overwrite to delete it and start again."
        )


def refuse_nothing_to_resume(work_dir: Path, loaded: LoadedSettings) -> None:
    """Raise CheckpointError if `work_dir` contains neither a checkpoint nor traces of a run of
    these settings, which ended before its first save (a job that is queued again)."""
    interrupted = any(work_dir.glob(".*.replaced"))  # see `folder_swap`
    if checkpoints_in(work_dir) or interrupted or are_kept(loaded, work_dir):
        return
    where = "contains no checkpoint to resume from" if work_dir.is_dir() else "does not exist"
    raise CheckpointError(
        f"{work_dir} {where}, and no run of these settings has started there: check --work-dir, or "
        "start without --resume. `--resume auto` starts from the beginning if there is no "
        "checkpoint."
    )


def claim(work_dir: Path, loaded: LoadedSettings, *, resume: str | None, overwrite: bool) -> bool:
    """Check that a run may start in `work_dir`, whose lock it holds.

    Args:
        resume: 'last', 'auto', a checkpoint, or None for a new run.
        overwrite: Whether checkpoints of an earlier run are deleted.

    Returns:
        Whether there is no checkpoint. A new run then records its settings, so that it can be
        resumed even if it ends before its first save.

    Raises:
        CheckpointError: It would mix with an earlier run, or there is nothing to resume.
    """
    recover(work_dir)
    if not resume and not overwrite:
        refuse_earlier_run(work_dir)
    if resume == LAST:
        refuse_nothing_to_resume(work_dir, loaded)
    if checkpoints_in(work_dir):
        return False
    if resume in (None, LAST, AUTO):
        keep_settings(loaded, work_dir)
    return True
