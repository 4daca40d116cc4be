"""A run as the page shows it, from the files of the run: progress, curve, sample answers, log."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape

from xtuner.errors import XTunerError
from xtuner.i18n import Words
from xtuner.runs import answers, chart, report
from xtuner.runs.folder import RUNNING, RunFolder
from xtuner.web.folders import Folders
from xtuner.web.jobs import Jobs
from xtuner.web.snippets import hint, working

_LAST_STEPS = 50
_STYLES = ("main", "second")


def view(jobs: Jobs, folders: Folders, names: Sequence[str], words: Words) -> str:
    """One run, or two compared, as HTML."""
    names = [name for name in names if name in jobs.names()]
    if not names:
        return f'<p class="hint">{words("runs_none")}</p>'
    runs = {name: _folder(folders, name) for name in names}
    parts: list[str] = []
    for name, run in runs.items():
        parts += _head(jobs, name, run, words)
    parts += _merge(jobs, names[0], words)
    known = [run for run in runs.values() if run is not None]
    parts += _curves(known, words)
    for run in known:
        if table := answers.table(run.evaluations, words):
            title = f" · {escape(run.name)}" if len(known) > 1 else ""
            parts.append(f"<h3>{words('section_answers')}{title}</h3>{table}")
    if log := escape(_log(jobs, names[0], runs[names[0]])):
        parts.append(f"<h3>{words('runs_log')}</h3><pre class='log'>{log}</pre>")
    return f'<div class="report">{"".join(parts)}</div>'


def _merge(jobs: Jobs, name: str, words: Words) -> Iterator[str]:
    """The state of the last merge of the run."""
    if (found := jobs.merging(name)) is None:
        return
    state, out = found
    text = words(f"runs_merge_{state}", folder=out)
    yield working(text) if state == "running" else hint(text)
    if state == "failed":
        yield f"<pre class='log'>{escape(jobs.merge_log(name))}</pre>"


def _folder(folders: Folders, name: str) -> RunFolder | None:
    """The run, once it has written something."""
    try:
        return RunFolder(folders.work_dir(name))
    except XTunerError:
        return None


def _log(jobs: Jobs, name: str, run: RunFolder | None) -> str:
    """What the run printed, or the end of its log if another terminal started it."""
    if text := jobs.console(name).strip():
        return text
    logs = [path / f"{path.name}.log" for path in run.starts] if run else []
    lines = [line for log in logs if log.is_file() for line in log.read_text().splitlines()]
    return "\n".join(lines[-_LAST_STEPS:])


def _head(jobs: Jobs, name: str, run: RunFolder | None, words: Words) -> Iterator[str]:
    status = jobs.status(name)
    badge = f'<span class="badge {status}">{words("status_" + status)}</span>'
    yield f"<h2>{escape(name)}{badge}</h2>"
    if run is None or not run.scalars:
        if status == RUNNING:
            yield '<div class="loading"><span></span></div>'
        return
    record, last = run.record, run.scalars[-1]
    total = record.total_steps if record else run.step
    share = 100 * run.step / max(1, total)
    yield f'<div class="progress"><span style="width:{share:.1f}%"></span></div>'
    facts = [(words("tile_steps"), words("step_of", step=run.step, total=total)),
             (words("runs_epoch"), f"{last.get('epoch', 0):.2f}")]  # fmt: skip
    seconds = [value for _, value in run.series("seconds")][-_LAST_STEPS:]
    if status == RUNNING and seconds and run.step < total:
        left = statistics.mean(seconds) * (total - run.step)
        facts.append((words("runs_left"), report.duration(left)))
    for key, name_, style in (
        ("tile_loss", "loss", ".4f"),
        ("tile_val_loss", "val_loss", ".4f"),
        ("tile_speed", "tokens_per_second", ",.0f"),
    ):
        if points := run.series(name_):
            facts.append((words(key), f"{points[-1][1]:{style}}"))
    if memory := run.series("memory_mb"):
        facts.append((words("tile_memory"), f"{max(v for _, v in memory):,.0f} MiB"))
    shown = "".join(f"<span>{label} <b>{value}</b></span>" for label, value in facts)
    yield f'<div class="facts">{shown}</div>'


def _curves(runs: Sequence[RunFolder], words: Words) -> Iterator[str]:
    """The loss of one run with its steps, or the running means of two."""
    if len(runs) == 1:
        svg = report.loss_chart(runs[0], words)
    else:
        lines = []
        for run, style in zip(runs, _STYLES, strict=False):
            lines.append(chart.Line(run.name, chart.smoothed(run.series("loss")), style))
            if points := run.series("val_loss"):
                label = f"{run.name}, {words('curve_val_loss')}"
                lines.append(chart.Line(label, points, style, dots=True))
        svg = chart.draw(lines, label=words("curve_loss"), x_label=words("curve_axis"))
    if svg:
        yield f"<h3>{words('curve_loss')}</h3>{svg}"
