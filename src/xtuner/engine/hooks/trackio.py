"""Sends scalars to Trackio, which by default keeps them on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.engine.hooks._reporter import Reporter
from xtuner.engine.hooks.base import Run


class Hook(Reporter):
    """Logs under the name of the work dir."""

    package = "trackio"

    def open(self, run: Run, config: Mapping[str, Any]) -> None:
        """See `Reporter.open`."""
        self.module.init(
            project=run.settings.report_project, name=run.work_dir.name, config=dict(config)
        )
