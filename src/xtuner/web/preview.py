"""What the page shows before a run: the data as understood, and which methods fit the machine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.text import Text as StyledText

from xtuner.config import recipe
from xtuner.config.builtin import catalog
from xtuner.config.load import LoadedSettings
from xtuner.config.schema import Settings
from xtuner.data.build import TrainingData
from xtuner.data.report.check import bad_rows
from xtuner.data.report.show_tokens import draw
from xtuner.device.select import pick_device
from xtuner.errors import XTunerError
from xtuner.hub import fetch
from xtuner.i18n import Words
from xtuner.memory.plan import plan_memory
from xtuner.runs import data_section
from xtuner.training.data_parts import DataParts
from xtuner.types import Conversation, Message

METHODS = ("lora", "qlora", "full")
"""In the order in which they are recommended where several fit."""

_MOST_BAD_ROWS = 50
_MB = 2**20


@dataclass(frozen=True)
class DataView:
    """The data as understood.

    Attributes:
        html: Format, rows, the first sample with the supervised part marked, and every bad row.
        steps: Optimizer steps of the run.
        questions: The user's questions in the first rows.
        bad_rows: Some rows cannot be used.
    """

    html: str
    steps: int
    questions: tuple[str, ...]
    bad_rows: bool = False


def local_model(name: str) -> str:
    """The folder of a model of the catalog, fetched if needed; other names as they are.

    Raises:
        ModelError: It cannot be fetched.
    """
    return str(fetch.fetch(name)) if name in catalog.models() else name


def look_at_data(loaded: LoadedSettings, words: Words) -> DataView:
    """Read the data of `loaded` as training would.

    Raises:
        XTunerError: The data or the model's tokenizer cannot be used.
    """
    parts = DataParts.open(loaded)
    rows = bad_rows(parts.settings, **parts.arguments, unusable=[], quiet=True)
    bad = list(itertools.islice(rows, _MOST_BAD_ROWS + 1))
    data = parts.build(quiet=True)
    sample = data.train[0][0]
    text = draw(sample, "text", tokenizer=parts.tokenizer, marks=False,
                image_layout=parts.image_layout)  # fmt: skip
    table = "".join(data_section.parts(data.report.as_dict(), words, details=False))
    html = [f'<div class="report">{table}</div>']
    html.append(f"<h4>{words('data_first', row=escape(str(sample.row)))}</h4>")
    html.append(f'<pre class="tokens">{_html(text)}</pre>')
    if bad:
        html.append(f"<h4>{words('data_bad')}</h4>")
        html.append(f'<p class="hint">{words("data_left_aside")}</p>')
        shown = "\n".join(bad[:_MOST_BAD_ROWS]) + ("\n…" if len(bad) > _MOST_BAD_ROWS else "")
        html.append(f'<pre class="log">{escape(shown)}</pre>')
    return DataView("".join(html), _steps(parts.settings, data), _questions(parts), bool(bad))


def _steps(settings: Settings, data: TrainingData) -> int:
    """Optimizer steps of the run, in one process."""
    packs = len(data.train)
    found = recipe.resolved(
        settings,
        rows=data.train.num_samples,
        packs=packs,
        length=data.pack_length,
        ranks=1,
        repetitions=data.repetitions,
    )
    accumulated, epochs = found.accumulative_counts, found.max_epochs
    assert accumulated != "auto" and epochs != "auto"
    steps = recipe.epoch_steps(found, packs=packs, accumulated=accumulated, ranks=1) * epochs
    return min(steps, found.max_steps or steps)


def _html(text: StyledText) -> str:
    """Styled text as HTML: supervised tokens are marked."""
    kinds = {"bold green": "on", "dim": "off", "cyan": "image"}
    return "".join(
        f'<span class="{kinds.get(str(span.style), "off")}">'
        f"{escape(text.plain[span.start : span.end])}</span>"
        for span in text.spans
    )


def _questions(parts: DataParts) -> tuple[str, ...]:
    """The first questions of the data, to be asked before and after training."""
    from xtuner.data.sources.resolve import prepare

    found: list[str] = []
    (source, *_) = prepare(parts.settings, folder=parts.folder)
    for task in itertools.islice(source.tasks(), 20):
        row: Any = task.row.parsed()
        try:
            record = source.formats[task.file].convert(row)
        except Exception:  # a bad row is reported elsewhere
            continue
        if isinstance(record, Conversation):
            found += _first_question(record.messages)
    return tuple(dict.fromkeys(found))[:2]


def _first_question(messages: tuple[Message, ...]) -> list[str]:
    asked = (m for m in messages if m.role == "user" and not m.images)
    return [message.content for message in asked if len(message.content) < 300][:1]


def suggested(values: Mapping[str, Any], view: DataView) -> dict[str, Any]:
    """`values` with questions and checkpoints at every fifth of the run."""
    every = max(1, view.steps // 5)
    return {
        **values,
        "save_steps": every,
        "evaluation_freq": every,
        "save_total_limit": 5,
        "evaluation_inputs": list(view.questions),
        "tensorboard": False,
        # the page has listed the bad rows, and says that they will be left out
        **({"max_lost_rows": 1.0} if view.bad_rows else {}),
    }


@dataclass(frozen=True)
class Method:
    """A method, and whether it fits.

    Attributes:
        tuning: Value of the setting.
        fits: Whether it fits, according to the forecast.
        peak, available: MiB.
    """

    tuning: str
    fits: bool
    peak: float
    available: float


def methods(loaded: LoadedSettings) -> list[Method]:
    """The methods, the recommended one first; one whose forecast fails is left out.

    Raises:
        XTunerError: The model's configuration cannot be read.
    """
    device = pick_device(loaded.settings.device)
    found = []
    for tuning in METHODS:
        settings = loaded.settings.model_copy(update=catalog.recipe(tuning))
        plan = plan_memory(settings, device)
        if not plan.forecast.failure:
            found.append(Method(tuning, plan.fits, plan.forecast.peak / _MB, plan.memory / _MB))
    return sorted(found, key=lambda method: not method.fits)


def starting_values(model: str, tuning: str) -> dict[str, Any]:
    """The settings of a model and a method: those of the built-in settings where there are any,
    and 'auto' for what depends on the amount of data."""
    try:
        values = catalog.compose(f"{model}_{tuning}_custom")
    except XTunerError:
        values = {"prompt_template": "auto", **catalog.recipe(tuning)}
    automatic = {**dict.fromkeys(recipe.AUTOMATIC, "auto"), "batch_size": 1}
    return {**values, **automatic, "pretrained_model_name_or_path": local_model(model)}
