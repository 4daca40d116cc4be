"""Sends scalars to Weights & Biases; ``WANDB_*`` variables select account, mode and project."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from xtuner.engine.hooks._reporter import Reporter
from xtuner.engine.hooks.base import Run


class Hook(Reporter):
    """Logs under the name of the work dir."""

    package = "wandb"

    def open(self, run: Run, config: Mapping[str, Any]) -> None:
        """See `Reporter.open`."""
        self.module.init(
            project=os.environ.get("WANDB_PROJECT") or run.settings.report_project,
            name=run.work_dir.name,
            dir=str(run.log_dir),
            config=dict(config),
        )
