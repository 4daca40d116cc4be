"""The tab Runs: watch, stop, resume, compare, chat with a checkpoint, merge."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from xtuner.errors import XTunerError
from xtuner.i18n import Words
from xtuner.runs.folder import RunFolder
from xtuner.web import run_view
from xtuner.web.site import Site
from xtuner.web.snippets import PRIVATE, fault, hint

_SECONDS = 2.0
_NONE = ""
_NEWEST = ""

_Updates = Any
_Shown = tuple[str, str, tuple[str, ...] | None]
"""A run, its view, and its checkpoints."""
_NOTHING_SHOWN: _Shown = ("", "", None)


class RunsTab:
    """The components of the tab and what they do; `show` connects it with the other tabs."""

    def __init__(self, site: Site, words: Words) -> None:
        self._site, self._words = site, words
        names = site.jobs.names()
        with gr.Row(elem_classes="top"):
            self.run = gr.Dropdown(
                names, value=names[0] if names else None, label=words("runs_run"), elem_id="run"
            )
            self.other = gr.Dropdown(
                [(words("nothing"), _NONE), *names], value=_NONE, label=words("runs_compare"),
                elem_id="run-compare",
            )  # fmt: skip
            self.checkpoint = gr.Dropdown(
                [(words("runs_newest"), _NEWEST)], value=_NEWEST, label=words("runs_checkpoint"),
                elem_id="checkpoint",
            )  # fmt: skip
        with gr.Row(elem_classes="buttons wide"):
            self.stop = gr.Button(words("runs_stop"), size="sm", elem_id="run-stop")
            self.resume = gr.Button(words("runs_resume"), size="sm", elem_id="run-resume")
            self.chat = gr.Button(words("runs_chat"), size="sm", elem_id="run-chat")
            self.merge = gr.Button(words("runs_merge"), size="sm", elem_id="run-merge")
            self.report = gr.HTML(elem_id="run-report", padding=False)
        self.message = gr.HTML(elem_id="runs-message", padding=False)
        self.view = gr.HTML(elem_id="run-view", padding=False)
        self.shown = gr.State(_NOTHING_SHOWN)
        self.timer = gr.Timer(_SECONDS)
        self._wire()

    @property
    def shows(self) -> list[Any]:
        """The components that `started` updates."""
        return [self.run, self.message]

    def started(self, name: str) -> list[_Updates]:
        """Show the run `name`, which has just started."""
        names = self._site.jobs.names()
        return [gr.update(choices=names, value=name), ""]

    def _wire(self) -> None:
        chosen = [self.run, self.other]
        outputs = [self.view, self.report, self.checkpoint, self.shown]
        for dropdown in chosen:
            dropdown.change(self._show, chosen, [*outputs, self.message], **PRIVATE)
        self.timer.tick(self._tick, [*chosen, self.shown], outputs, **PRIVATE)
        self.stop.click(self._stop, self.run, self.message, **PRIVATE)
        self.resume.click(self._resume, self.run, self.message, **PRIVATE)
        self.merge.click(self._merge, [self.run, self.checkpoint], self.message, **PRIVATE)

    def wire_chat(self, tabs: gr.Tabs, model: gr.Dropdown, other: gr.Dropdown) -> None:
        """Let the button open the checkpoint and its base model side by side in the tab Chat."""
        self.chat.click(
            self._chat,
            [self.run, self.checkpoint],
            [tabs, model, other, self.message],
            **PRIVATE,
        )

    def wire_page(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Show the newest run when the page opens, and offer new ones when the tab is selected."""
        chosen = [self.run, self.other]
        outputs = [self.view, self.report, self.checkpoint, self.shown, self.message]
        page.load(self._newest, None, chosen, **PRIVATE).then(
            self._show, chosen, outputs, **PRIVATE
        )
        tab.select(self._refreshed, None, chosen, **PRIVATE)

    def _newest(self) -> _Updates:
        run, other = self._refreshed()
        return gr.update(**run, value=next(iter(self._site.jobs.names()), None)), other

    def _refreshed(self) -> tuple[_Updates, _Updates]:
        names = self._site.jobs.names()
        none = (self._words("nothing"), _NONE)
        return gr.update(choices=names), gr.update(choices=[none, *names])

    def _show(self, run: str | None, other: str | None) -> list[_Updates]:
        return [*self._tick(run, other, _NOTHING_SHOWN), ""]

    def _tick(self, run: str | None, other: str | None, shown: _Shown) -> list[_Updates]:
        """The view and the checkpoints to choose from, if they have changed."""
        site, names = self._site, [name for name in (run, other) if name]
        view = run_view.view(site.jobs, site.folders, names, self._words)
        known = run if run in site.jobs.names() else None
        checkpoints = tuple(self._checkpoints(known)) if known else ()
        now = (run or "", view, checkpoints)
        if now == shown:
            return [gr.skip()] * 4
        link = (
            f'<a class="button" href="/report/{escape(known)}" target="_blank" rel="noopener">'
            f"{self._words('runs_report')}</a>"
            if known
            else ""
        )
        newest = (self._words("runs_newest"), _NEWEST)
        # an update of the choices puts back what someone types or looks at
        changes: dict[str, Any] = {"value": _NEWEST} if now[0] != shown[0] else {}
        if checkpoints != shown[2]:
            changes["choices"] = [newest, *checkpoints]
        return [view, link, gr.update(**changes) if changes else gr.skip(), now]

    def _checkpoints(self, run: str) -> list[str]:
        try:
            folder = RunFolder(self._site.folders.work_dir(run))
        except XTunerError:
            return []
        return [path.name for path in reversed(folder.checkpoints())]

    def _stop(self, run: str | None) -> str:
        try:
            stopped = self._site.jobs.stop(run or "")
        except XTunerError as error:
            return fault(error)
        key = "runs_stopping" if stopped else "runs_not_running"
        return hint(self._words(key, name=run))

    def _resume(self, run: str | None) -> str:
        try:
            self._site.jobs.resume(run or "")
        except XTunerError as error:
            return fault(error)
        return hint(self._words("runs_resumed", name=run))

    def _merge(self, run: str | None, checkpoint: str) -> str:
        try:
            name = checkpoint or next(iter(self._checkpoints(run or "")), "")
            self._site.jobs.merge(run or "", name)
        except XTunerError as error:
            return fault(error)
        return ""  # the view shows its progress

    def _chat(self, run: str | None, checkpoint: str) -> list[_Updates]:
        """The checkpoint and the model that it started from, side by side."""
        try:
            folder = RunFolder(self._site.folders.work_dir(run or ""))
            path = folder.work_dir / checkpoint if checkpoint else folder.checkpoints()[-1]
            record = folder.record
        except (XTunerError, IndexError) as error:
            return [gr.skip(), gr.skip(), gr.skip(), fault(error)]
        base = record.base_model if record else _NONE
        return [gr.Tabs(selected="chat"), base or str(path), str(path) if base else _NONE, ""]
