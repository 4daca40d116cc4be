"""A run does not mix its checkpoints with those of an earlier run. Imports no torch, so that the
command can check this first.
"""

from __future__ import annotations

import re
from pathlib import Path

from xtuner.errors import CheckpointError

_NAME = re.compile(r"iter_(\d+)$")


def refuse_earlier_run(work_dir: Path) -> None:
    """Raise CheckpointError if `work_dir` contains checkpoints."""
    found = [(int(name[1]), path) for path in work_dir.glob("iter_*")
             if (name := _NAME.match(path.name)) and path.is_dir()]  # fmt: skip
    if found:
        raise CheckpointError(
            f"{work_dir} contains {max(found)[1].name} of an earlier run. Add --resume to continue "
            "it, --work-dir DIR to use another folder, or --overwrite to delete it and start again."
        )
