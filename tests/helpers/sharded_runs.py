"""Complete training runs, several in one process of a group, as in `xtuner train`."""

import json
from pathlib import Path

from xtuner.config.load import load_settings
from xtuner.engine.signals import Interrupted
from xtuner.errors import XTunerError
from xtuner.parallel.processes import Processes
from xtuner.training.run import _TrainingRun


def runs(folder, cases):
    """Execute the runs `cases` one after another; return how each ended.

    Args:
        folder: Folder of the settings files.
        cases: (settings file, work dir, overrides, resume).
    """
    made = {size: Processes("cpu", sequence_parallel_size=size) for size in sizes_of(cases)}
    ends = [end_of(made[sizes_of([case]).pop()], Path(folder), *case) for case in cases]
    next(iter(made.values())).close()
    return ends


def sizes_of(cases):
    """The values of `sequence_parallel_size` in `cases`."""
    sizes = set()
    for _, _, overrides, *_ in cases:
        chosen = dict(override.split("=", 1) for override in overrides)
        sizes.add(int(chosen.get("sequence_parallel_size", 1)))
    return sizes


def end_of(processes, folder, config, work_dir, overrides=(), resume=None):
    """The last step of a run, or its error."""
    loaded = load_settings(str(folder / config), overrides=list(overrides))
    try:
        result = _TrainingRun(loaded, processes, folder / work_dir).train(resume, False)
    except XTunerError as error:
        return f"{type(error).__name__}: {error}"
    except Interrupted as stopped:
        return f"Interrupted: {stopped}"
    return result.step


def scalars(work_dir):
    """The logged numbers by step, over all starts; later starts win."""
    found = {}
    for file in sorted(Path(work_dir).glob("*/scalars.jsonl")):
        for line in file.read_text().splitlines():
            values = json.loads(line)
            if "loss" in values:
                found[values["step"]] = values
    return found


def answers(work_dir):
    """The sample answers of a run, in order."""
    return [file.read_text() for file in sorted(Path(work_dir).glob("*/eval_outputs*"))]
