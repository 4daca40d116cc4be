"""One page in one language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from xtuner import i18n
from xtuner.runs import report
from xtuner.web.chat_tab import ChatTab
from xtuner.web.runs_tab import RunsTab
from xtuner.web.site import Site
from xtuner.web.train_tab import TrainTab

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(site: Site, language: str) -> gr.Blocks:
    """The page in `language`."""
    words = i18n.words(language)
    other = next(name for name in i18n.LANGUAGES if name != language)
    with gr.Blocks(
        analytics_enabled=False,
        title=words("page_title"),
        fill_width=True,
        delete_cache=(600, 86400),
    ) as page:
        gr.HTML(
            f'<div id="head"><b>xtuner</b><a href="/language/{other}" id="language">'
            f"{words('other_language')}</a></div>",
            padding=False,
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(words("tab_chat"), id="chat") as chat_tab:
                chat = ChatTab(site, words)
            with gr.Tab(words("tab_train"), id="train", render_children=True):
                train_column = gr.Column()
            with gr.Tab(words("tab_runs"), id="runs") as runs_tab:
                runs = RunsTab(site, words)
            with train_column:
                TrainTab(site, words, started=runs.started, shows=runs.shows)
        chat.wire_page(page, chat_tab)
        runs.wire_page(page, runs_tab)
        runs.wire_chat(tabs, chat.model, chat.other)
    page.queue(default_concurrency_limit=8, max_size=64)
    return page


def look() -> dict[str, Any]:
    """Theme and style of the page: fonts of the system, nothing from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=list(_FONT), font_mono=list(_MONO)
    )
    return {"theme": theme, "head": f'<link rel="icon" href="data:,"><style>{_style()}</style>'}


def _style() -> str:
    """The style of the page, and that of the report's parts inside `.report`."""
    own = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return own + report.part_style(".report")
