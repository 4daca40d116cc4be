"""What a run starts from: the base model, a checkpoint to resume, or old weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from xtuner.config.schema import Settings
from xtuner.convert import old_checkpoint
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.resume import check_shape
from xtuner.hub import old_pth
from xtuner.models import manifest


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
        resume: 'last', the name of a checkpoint in the work dir, or a .pth of XTuner 0.x.
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
        source = store.find(None if resume == "last" else resume)
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
