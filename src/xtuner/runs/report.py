"""The report of a run: one self-contained HTML file without scripts.

    RunFolder ──► sections ──► work_dir/report.html

Text that comes from data or from the model is escaped, and the page's content security policy
allows neither scripts nor anything from elsewhere.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from xtuner import i18n
from xtuner.config.render import literal
from xtuner.config.schema import Settings
from xtuner.hub.sharing import shareable, shareable_command
from xtuner.i18n import Words
from xtuner.runs import answers, chart, data_section
from xtuner.runs.folder import REPORT_FILE, RunFolder
from xtuner.runs.record import RunRecord

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SMALL_CURVES = ("lr", "grad_norm", "tokens_per_second", "memory_mb")
_MB = 2**20


def write(
    work_dir: Path, *, language: str = "en", status: str = "", out: Path | None = None
) -> Path:
    """Write the report of the run in `work_dir` and return its path.

    Args:
        work_dir: The work dir of the run.
        language: 'en' or 'zh'.
        status: The run's status; empty determines it, which the run's own process must not do.
        out: The file; None is ``work_dir/report.html``.

    Raises:
        CheckpointError: `work_dir` is not the work dir of a run.
    """
    path = out or Path(work_dir) / REPORT_FILE
    text = page(RunFolder(work_dir), language=language, status=status)
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


def page(run: RunFolder, *, language: str = "en", status: str = "") -> str:
    """The report as HTML; arguments as for `write`."""
    words = i18n.words(language)
    parts = _Page(run, words, status or run.status()).parts()
    body = "".join(map(shareable, parts))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = escape(words("report_of", name=run.name))
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


class _Page:
    """The sections of the report."""

    def __init__(self, run: RunFolder, words: Words, status: str) -> None:
        self.run, self.words, self.status = run, words, status
        self.record: RunRecord | None = run.record
        self.settings: Mapping[str, Any] = shareable(self.record.settings) if self.record else {}

    def parts(self) -> Iterator[str]:
        words = self.words
        yield from self._head()
        yield from _section(words("section_answers"), self._answers())
        yield from _section(words("section_curves"), self._curves())
        yield from _section(words("section_data"), self._data())
        yield from _section(words("section_memory"), self._memory())
        yield from _section(words("section_next"), self._next())
        if self.record:
            yield from _section(words("section_settings"), self._settings())
            yield from _section(words("section_machine"), self._machine(self.record))

    def _head(self) -> Iterator[str]:
        words, s = self.words, self.settings
        badge = f'<span class="badge {self.status}">{words("status_" + self.status)}</span>'
        yield f"<h1>{escape(self.run.name)}{badge}</h1>"
        if s:
            what = f"{s['pretrained_model_name_or_path']} · {s['algorithm']} · {s['tuning']}"
            yield f'<p class="sub">{escape(what)}</p>'
        if self.record:
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.record.started))
            yield f'<p class="sub">{words("started_at", time=started)}</p>'
            if self.record.message:
                yield f'<pre class="warning">{escape(self.record.message)}</pre>'
        yield '<div class="tiles">'
        for name, value, more in self._tiles():
            yield f'<div class="tile"><span>{words(name)}</span><b>{value}</b>'
            yield f"<span>{more}</span></div>"
        yield "</div>"

    def _tiles(self) -> Iterator[tuple[str, str, str]]:
        words, run = self.words, self.run
        total = self.record.total_steps if self.record else run.step
        epoch = ""
        if run.scalars:
            epoch = words("epochs_of", epochs=f"{run.scalars[-1].get('epoch', 0):.2f}")
        yield "tile_steps", words("step_of", step=run.step, total=total), epoch
        for tile, name in (("tile_loss", "loss"), ("tile_val_loss", "val_loss")):
            if points := run.series(name):
                first = words("from_value", value=f"{points[0][1]:.4f}")
                yield tile, f"{points[-1][1]:.4f}", first
        if speeds := run.series("tokens_per_second"):
            yield "tile_speed", f"{statistics.median(v for _, v in speeds):,.0f}", ""
        if memory := run.series("memory_mb"):
            yield "tile_memory", f"{max(v for _, v in memory):,.0f} MiB", ""
        if seconds := _seconds(run):
            yield "tile_time", duration(seconds), ""

    def _answers(self) -> Iterator[str]:
        if shown := answers.table(self.run.evaluations, self.words):
            yield f'<p class="note">{self.words("answers_about")}</p>{shown}'
        else:
            yield f'<p class="note">{self.words("answers_none")}</p>'

    def _curves(self) -> Iterator[str]:
        words, run = self.words, self.run
        if not (svg := loss_chart(run, words)):
            yield f'<p class="note">{words("curves_none")}</p>'
            return
        if note := _overfitting(run.series("val_loss"), words):
            yield f'<p class="warning">{note}</p>'
        yield f'<div class="panel"><h3>{words("curve_loss")}</h3>{svg}</div><div class="small">'
        for name in _SMALL_CURVES:
            if points := run.series(name):
                title = words(f"curve_{name}")
                svg = chart.draw([chart.Line("", points)], label=title, x_label=words("curve_axis"))
                yield f'<div class="panel"><h3>{title}</h3>{svg}</div>'
        yield "</div>"

    def _data(self) -> Iterator[str]:
        if self.run.data:
            yield from data_section.parts(self.run.data, self.words)
        else:
            yield f'<p class="note">{self.words("data_none")}</p>'

    def _memory(self) -> Iterator[str]:
        words, run = self.words, self.run
        measured = max((v for _, v in run.series("memory_mb")), default=0.0)
        forecast = self.record.forecast if self.record else {}
        bars = [("memory_measured", measured)] if measured else []
        if forecast:
            bars.insert(0, ("memory_forecast", forecast["peak"] / _MB))
            bars.append(("memory_available", forecast["available"] / _MB))
        else:
            yield f'<p class="note">{words("memory_none")}</p>'
        longest = max((value for _, value in bars), default=1.0)
        yield '<div class="bars">'
        for name, value in bars:
            style = "bar soft" if name == "memory_available" else "bar"
            yield f"<span>{words(name)}</span>"
            yield f'<span class="{style}" style="width:{100 * value / longest:.1f}%"></span>'
            yield f"<span>{value:,.0f} MiB</span>"
        yield "</div>"
        if steps := run.series("seconds"):
            tokens = sum(s.get("tokens_per_second", 0) * s.get("seconds", 0) for s in run.scalars)
            waiting = sum(v for _, v in run.series("data_seconds")) / (_seconds(run) or 1)
            yield "<p>" + words(
                "speed_line",
                seconds=f"{statistics.median(v for _, v in steps):.3g}",
                data=f"{waiting:.1%}",
                tokens=round(tokens),
                time=duration(_seconds(run)),
            ) + "</p>"  # fmt: skip

    def _next(self) -> Iterator[str]:
        for key, command in next_commands(self.run, self.record, self.status):
            yield f"<h3>{self.words(key)}</h3><pre>{escape(command)}</pre>"

    def _settings(self) -> Iterator[str]:
        assert self.record
        known = [name for name in Settings.model_fields if name in self.settings]
        given = [name for name in known if name in self.record.changed]
        yield f'<p class="note">{self.words("settings_given")}</p>'
        yield f"<pre>{escape(_assignments(given, self.settings))}</pre>"
        yield f"<details><summary>{self.words('settings_all')}</summary>"
        yield f"<pre>{escape(_assignments(known, self.settings))}</pre></details>"

    def _machine(self, record: RunRecord) -> Iterator[str]:
        facts = {
            **record.versions,
            "python": record.python,
            "device": f"{record.device}, {record.dtype}",
            "processes": record.processes,
            "host": record.host,
        }
        cells = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items()
        )
        yield f'<div class="scroll"><table>{cells}</table></div>'
        yield f"<details><summary>{self.words('section_log')}</summary>"
        yield f"<pre>{escape(chr(10).join(record.lines).strip())}</pre></details>"


def loss_chart(run: RunFolder, words: Words) -> str:
    """The loss of each step, its running mean and the validation loss; empty before any step."""
    losses = run.series("loss")
    if not losses:
        return ""
    lines = [
        chart.Line(words("curve_loss_each"), losses, "faint"),
        chart.Line(words("curve_loss_mean"), chart.smoothed(losses), "main"),
        chart.Line(words("curve_val_loss"), run.series("val_loss"), "second", dots=True),
    ]
    return chart.draw(
        lines,
        label=words("curve_loss"),
        x_label=words("curve_axis"),
        marks=[evaluation.step for evaluation in run.evaluations],
        marks_label=words("curve_answers"),
    )


def next_commands(
    run: RunFolder, record: RunRecord | None, status: str
) -> Iterator[tuple[str, str]]:
    """Next steps for the user: the key of a heading, and a command."""
    folder = run.work_dir
    if run.checkpoints():
        yield "next_chat", shareable_command("xtuner", "chat", folder)
    if record is None:
        return
    if status in ("interrupted", "failed", "killed") and run.checkpoints():
        file = folder / f"{record.name}.py"
        words: tuple[object, ...] = ("train", file, "--work-dir", folder, "--resume")
        yield "next_resume", shareable_command("xtuner", *words)
    if run.checkpoints() and record.settings.get("tuning") != "full":
        words = ("convert", "merge", record.base_model, folder, folder / "merged")
        yield "next_merge", shareable_command("xtuner", *words)


def part_style(inside: str) -> str:
    """The style of the report's parts, for a page that shows them inside the selector `inside`."""
    text = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"{inside} {{ {text.replace(':root', '&').replace('body {', '& .body {')} }}"


def duration(seconds: float) -> str:
    """A time such as ``1:02:03`` or ``4:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _section(title: str, parts: Iterator[str]) -> Iterator[str]:
    yield f"<section><h2>{title}</h2>"
    yield from parts
    yield "</section>"


def _overfitting(points: Sequence[tuple[float, float]], words: Words) -> str:
    """A note if the validation loss has risen more than 5 % above its minimum."""
    if len(points) < 3:
        return ""
    step, low = min(points, key=lambda point: point[1])
    last = points[-1][1]
    if last < 1.05 * low:
        return ""
    return words("overfit_note", step=int(step), low=f"{low:.4f}", last=f"{last:.4f}")


def _seconds(run: RunFolder) -> float:
    return sum(value for _, value in run.series("seconds"))


def _assignments(names: Sequence[str], settings: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {literal(name, settings[name])}" for name in names)
