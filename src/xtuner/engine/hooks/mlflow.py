"""Sends scalars to MLflow; the environment variable ``MLFLOW_TRACKING_URI`` selects the server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from xtuner.engine.hooks._reporter import Reporter
from xtuner.engine.hooks.base import Run

_MAX_TEXT = 500
"""Maximum length of a parameter that every server accepts."""

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Bounds the time that training waits for a server that does not answer; MLflow's own bounds allow
minutes per step."""


class Hook(Reporter):
    """Logs under the name of the work dir."""

    package = "mlflow"

    def open(self, run: Run, config: Mapping[str, Any]) -> None:
        """See `Reporter.open`."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.settings.report_project
        self.module.set_experiment(experiment)
        self.module.start_run(run_name=run.work_dir.name)
        try:
            self.module.log_params({name: str(value)[:_MAX_TEXT] for name, value in config.items()})
        except Exception:
            self.module.end_run("FAILED")  # or the next run of this process would log into it
            raise

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Reporter.log`."""
        self.module.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        """See `Reporter.finish`."""
        self.module.end_run()
