"""The tab Train: model, data and method in three choices, and all settings as a form."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from xtuner.config.builtin import catalog
from xtuner.config.load import load_settings
from xtuner.errors import ConfigError, XTunerError
from xtuner.i18n import Words
from xtuner.web import form, preview
from xtuner.web.site import Site
from xtuner.web.snippets import PRIVATE, fault, hint, working

_DATA_TYPES = [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"]
_Updates = Any
_SAVE = """(file) => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file[1]], {type: "text/x-python"}));
    link.download = file[0];
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""Lets the browser save a file, given as its name and text."""


class TrainTab:
    """The components of the tab and what they do.

    Args:
        site: Parts behind the page.
        words: Strings.
        started: Called with the name of a started run; returns updates for `shows`.
        shows: Components that show the started run.
    """

    def __init__(
        self,
        site: Site,
        words: Words,
        *,
        started: Callable[[str], Sequence[_Updates]],
        shows: Sequence[Any],
    ) -> None:
        self._site, self._words, self._started = site, words, started
        self._fields = form.fields(words)
        with gr.Row(elem_classes="top", equal_height=False):
            with gr.Column(min_width=300):
                self.model = gr.Dropdown(
                    self._models(), value=None, label=words("train_model"),
                    info=words("train_model_hint"), allow_custom_value=True, elem_id="train-model",
                )  # fmt: skip
                self.upload = gr.File(
                    label=words("train_upload"), file_types=_DATA_TYPES, height=150,
                    elem_id="data-file",
                )  # fmt: skip
                self.path = gr.Textbox(label=words("train_path"), elem_id="data-path")
                self.check = gr.Button(
                    words("train_check"), variant="primary", elem_id="check-data"
                )
            with gr.Column(min_width=300):
                self.method = gr.Radio(
                    self._plain_methods(), value="lora", label=words("train_method"),
                    info=words("train_method_hint"), elem_id="method",
                )  # fmt: skip
                self.name = gr.Textbox(label=words("train_name"), elem_id="run-name")
                self.start = gr.Button(words("train_start"), variant="primary", elem_id="start")
                with gr.Row():
                    self.importing = gr.UploadButton(
                        words("train_import"), file_types=[".py", ".yaml", ".yml"], size="sm",
                        elem_id="import",
                    )  # fmt: skip
                    self.exporting = gr.Button(words("train_export"), size="sm", elem_id="export")
        self.message = gr.HTML(elem_id="train-message", padding=False)
        self.exported = gr.JSON(visible="hidden")
        self.data = gr.HTML(elem_id="data-view", padding=False)
        with gr.Accordion(words("train_settings"), open=False, elem_id="settings"):
            self.form = self._make_form()
        self._wire(shows)

    def _models(self) -> list[tuple[str, str]]:
        pool = self._site.pool.choices()
        local = [(choice.label, choice.value) for choice in pool if "·" not in choice.label]
        return [*local, *((name, name) for name in catalog.models())]

    def _plain_methods(self) -> list[tuple[str, str]]:
        return [(self._words(f"method_{name}"), name) for name in preview.METHODS]

    def _make_form(self) -> list[Any]:
        """A control per setting: first those of copied settings files, then the others."""
        made: dict[str, Any] = {}
        for part, group in groupby(self._fields, key=lambda field: field.part):
            members = list(group)
            gr.Markdown(f"#### {part}")
            common = [field for field in members if field.common]
            others = [field for field in members if not field.common]
            with gr.Row(elem_classes="fields"):
                made.update({field.name: _control(field) for field in common})
            if others:
                title = self._words("train_more", part=part)
                with gr.Accordion(title, open=False), gr.Row(elem_classes="fields"):
                    made.update({field.name: _control(field) for field in others})
        return [made[field.name] for field in self._fields]

    def _wire(self, shows: Sequence[Any]) -> None:
        outputs = [self.message, self.data, self.method, self.name, *self.form]
        inputs = [self.model, self.path, self.upload, self.method, self.name]
        self.check.click(self._check, inputs, outputs, concurrency_limit=2, **PRIVATE)
        self.method.input(self._choose, self.method, self.form, **PRIVATE)
        self.start.click(self._start, [self.name, *self.form], [self.message, *shows], **PRIVATE)
        self.importing.upload(self._import, self.importing, outputs, **PRIVATE)
        self.exporting.click(
            self._export, [self.name, *self.form], [self.exported, self.message], **PRIVATE
        ).success(None, self.exported, None, js=_SAVE)

    def _check(
        self, model: str | None, path: str, upload: str | None, tuning: str, name: str
    ) -> Iterator[_Updates]:
        """Read model and data, forecast each method, and fill the form."""
        words = self._words
        data = upload or (path or "").strip()
        if not model or not data:
            yield self._answer(fault(ConfigError(words("train_no_choice"))))
            return
        yield self._answer(working(words("train_working")))
        try:
            self._site.folders.check(model)
            if upload is None:
                self._site.folders.check(data)
            else:
                data = self._keep(upload)
            values = preview.starting_values(model, tuning)
            values |= {"data_path": [data], "dataset_format": ["auto"]}
            loaded = form.checked(values, self._site.folders)
            view = preview.look_at_data(loaded, words)
            yield self._answer(working(words("train_measuring")), data=view.html)
            methods = preview.methods(loaded)
            best = methods[0].tuning if methods and methods[0].fits else tuning
            values = preview.suggested({**values, **catalog.recipe(best)}, view)
        except XTunerError as error:
            yield self._answer(fault(error), data="")
            return
        choices = [(self._label(method), method.tuning) for method in methods]
        yield self._answer(
            "",
            data=view.html,
            method=gr.update(choices=choices, value=best) if choices else gr.skip(),
            name=name or self._free_name(model),
            values=values,
        )

    def _answer(
        self,
        message: str,
        *,
        data: Any = None,
        method: Any = None,
        name: Any = None,
        values: Mapping[str, Any] | None = None,
    ) -> list[_Updates]:
        """Updates of message, data, method, name and form; those not given stay."""
        first = [message, *(gr.skip() if part is None else part for part in (data, method, name))]
        controls = [gr.skip()] * len(self.form) if values is None else form.controls_of(values)
        return [*first, *controls]

    def _label(self, method: preview.Method) -> str:
        key = "method_fits" if method.fits else "method_too_large"
        return self._words(
            key,
            label=self._words(f"method_{method.tuning}"),
            peak=f"{method.peak:,.0f}",
            available=f"{method.available:,.0f}",
        )

    def _keep(self, upload: str) -> str:
        """Copy an uploaded file to the folder of the runs, where it stays as long as they do."""
        source = Path(upload)
        folder = self._site.folders.runs / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        name = _file_name(source.name) or "data"
        content = source.read_bytes()
        target = folder / name
        for number in range(1, 1000):
            if not target.exists():
                target.write_bytes(content)
            if target.read_bytes() == content:
                return str(target)
            target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        raise ConfigError(f"{name}: too many files of this name in {folder}")

    def _free_name(self, model: str) -> str:
        stem = _file_name(Path(model).name).lstrip("._-")[:60] or "run"
        return f"{stem}_{time.strftime('%m%d_%H%M')}"

    def _choose(self, tuning: str) -> list[_Updates]:
        """Change the settings that depend on the method."""
        changes = catalog.recipe(tuning)
        return [
            form.shown(field, changes[field.name]) if field.name in changes else gr.skip()
            for field in self._fields
        ]

    def _start(self, name: str, *given: Any) -> list[_Updates]:
        """Check the form, and start the run as a process."""
        try:
            values = form.values_of(given)
            form.checked(values, self._site.folders)
            self._site.jobs.start(name.strip(), form.settings_file(values, name))
        except XTunerError as error:
            return [fault(error), *([gr.skip()] * len(self._started("")))]
        return [hint(self._words("train_started", name=name)), *self._started(name.strip())]

    def _import(self, file: str) -> list[_Updates]:
        """Fill the form from a settings file, which is read and not executed."""
        try:
            loaded = load_settings(file)
            values = {
                name: getattr(loaded.settings, name) for name in loaded.settings.model_fields_set
            }
            form.checked(values, self._site.folders)
        except XTunerError as error:
            return self._answer(fault(error))
        message = hint(self._words("train_imported", name=Path(file).name))
        return self._answer(message, method=gr.update(value=loaded.settings.tuning), values=values)

    def _export(self, name: str, *given: Any) -> list[_Updates]:
        """Name and text of the settings file of the form, which the browser saves."""
        try:
            values = form.values_of(given)
            form.checked(values, self._site.folders)
        except XTunerError as error:
            return [None, fault(error)]
        stem = _file_name(name) or "settings"
        return [[f"{stem}.py", form.settings_file(values, stem)], ""]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII).lstrip(".")


def _control(field: form.Field) -> Any:
    """The component of a setting."""
    value = form.shown(field, form.defaults()[field.name])
    common: dict[str, Any] = {
        "label": field.name,
        "info": field.help,
        "elem_id": f"set-{field.name}",
        "interactive": True,
        "min_width": 260,
    }
    if field.kind == "switch":
        return gr.Checkbox(value, **common)
    if field.kind == "choice":
        return gr.Dropdown(list(field.options), value=value, **common)
    return gr.Textbox(value, lines=2 if field.kind == "lines" else 1, max_lines=6, **common)
