"""State shared by both languages of the page and all visitors."""

from __future__ import annotations

from dataclasses import dataclass, field

from xtuner.chat.session import ToolUse
from xtuner.serve.engine import Engine
from xtuner.web.folders import Folders
from xtuner.web.jobs import Jobs
from xtuner.web.models import ModelPool
from xtuner.web.turns import Turns


@dataclass(frozen=True)
class Site:
    """Shared state of the page.

    Attributes:
        engine: The engine that generates answers.
        pool: The models.
        folders: The folders that the page may use.
        jobs: Runs as processes.
        first: The models that are chosen when a page opens: one, or two side by side.
        tools: The tools that the models may call, if any.
        turns: Answers in progress, by browser tab.
    """

    engine: Engine
    pool: ModelPool
    folders: Folders
    jobs: Jobs
    first: tuple[str, ...] = ()
    tools: ToolUse | None = None
    turns: Turns = field(default_factory=Turns)
