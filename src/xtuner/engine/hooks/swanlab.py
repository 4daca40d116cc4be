"""Sends scalars to SwanLab; the environment variables ``SWANLAB_*`` select account and mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.engine.hooks._reporter import Reporter
from xtuner.engine.hooks.base import Run


class Hook(Reporter):
    """Logs under the name of the work dir."""

    package = "swanlab"

    def open(self, run: Run, config: Mapping[str, Any]) -> None:
        """See `Reporter.open`."""
        self.module.init(
            project=run.settings.report_project,
            experiment_name=run.work_dir.name,
            logdir=str(run.log_dir / "swanlab"),
            config=dict(config),
        )
