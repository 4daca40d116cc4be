"""A run does not mix its checkpoints with those of an earlier run. Imports no torch, so that the
command can check this first.
"""

from __future__ import annotations

from pathlib import Path

from xtuner.errors import CheckpointError
from xtuner.models.references import checkpoints_in


def refuse_earlier_run(work_dir: Path) -> None:
    """Raise CheckpointError if `work_dir` contains checkpoints."""
    if found := checkpoints_in(work_dir):
        raise CheckpointError(
            f"{work_dir} contains {found[-1].name} of an earlier run. Add --resume to continue "
            "it, --work-dir DIR to use another folder, or --overwrite to delete it and start again."
        )
