"""Estimates what a run needs without reading weights or data."""

from __future__ import annotations

from rich.console import Console

from xtuner.config.load import LoadedSettings
from xtuner.device.select import pick_device, resolve_dtype
from xtuner.engine import strategies
from xtuner.engine.working import say
from xtuner.errors import LaunchError
from xtuner.memory.plan import plan_memory
from xtuner.models.can_pack import resolve_packing
from xtuner.training.opening_lines import lines_of_model
from xtuner.training.preflight import check_run


def dry_run(loaded: LoadedSettings, *, memory: int | None = None, processes: int = 1) -> bool:
    """Print what training needs, without reading weights or data; return whether it fits.

    Args:
        loaded: Checked settings with their name.
        memory: Bytes to plan for; None uses the free memory of the device.
        processes: Number of processes; on a CPU they share `memory`.

    Raises:
        XTunerError: The model cannot be found, the forecast failed, or the memory of a missing GPU
            was not given.
    """
    settings = loaded.settings
    device = "cuda" if settings.device == "cuda" else pick_device(settings.device)
    settings, packing = resolve_packing(settings)
    check_run(settings, folder=loaded.folder)
    strategies.check(settings, folder=loaded.folder)
    plan = plan_memory(settings, device, memory=memory, processes=processes, folder=loaded.folder)
    console = Console(highlight=False, soft_wrap=True)
    for line in lines_of_model(settings, plan, resolve_dtype(settings.dtype, device)):
        say(console, line)
    if packing:
        console.print(f"Samples      {packing}", markup=False)
    if plan.forecast.failure:
        raise LaunchError("the memory of this run is unknown; training may work")
    console.print(
        f"{'Fits' if plan.fits else 'Does not fit'} in {plan.memory / 2**20:,.0f} MiB"
        f"{f' for each of {processes} processes' if processes > 1 else ''}; rows of "
        f"{settings.max_length:,} tokens{' plus one image' if settings.has_vision else ''}, "
        f"{settings.batch_size} per micro-batch. Nothing was trained.",
        markup=False,
    )
    return plan.fits
