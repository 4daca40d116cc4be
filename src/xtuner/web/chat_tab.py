"""The tab Chat: one conversation, or two side by side, with tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from xtuner import templates
from xtuner.errors import ConfigError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.i18n import Words
from xtuner.types import Message
from xtuner.web import bubbles
from xtuner.web.bubbles import plain_name
from xtuner.web.conversation import AS_TRAINED, Asked, History, Side, answer
from xtuner.web.models import Opening
from xtuner.web.site import Site
from xtuner.web.snippets import PRIVATE, fault, hint, working
from xtuner.web.turns import Reply

_NONE = ""
_POLL_SECONDS = 0.3
_Updates = Any
_EMPTY: tuple[History, History] = ((), ())


class ChatTab:
    """The components of the tab and what they do."""

    def __init__(self, site: Site, words: Words) -> None:
        self._site, self._words = site, words
        first = [*site.first, _NONE, _NONE]
        with gr.Row(elem_classes="top"):
            self.model = self._dropdown("chat_model", first[0], wanted=True)
            self.other = self._dropdown("chat_compare", first[1], wanted=False)
        self.status = gr.HTML(elem_id="chat-status", padding=False)
        with gr.Row(elem_classes="chat", equal_height=False):
            with gr.Column(scale=5, min_width=320):
                with gr.Row(elem_classes="sides"):
                    self.left = self._chatbot("left", visible=True)
                    self.right = self._chatbot("right", visible=bool(first[1]))
                self.note = gr.HTML(elem_id="chat-note", padding=False)
                self._make_request()
                self.question = gr.MultimodalTextbox(
                    placeholder=words("chat_placeholder"),
                    show_label=False,
                    sources=[],
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=100_000,
                    elem_id="question",
                )
                with gr.Row(elem_classes="buttons"):
                    self.stop = gr.Button(words("chat_stop"), size="sm", elem_id="stop")
                    self.retry = gr.Button(words("chat_retry"), size="sm", elem_id="retry")
                    self.clear = gr.Button(words("chat_clear"), size="sm", elem_id="clear")
            with gr.Column(scale=1, min_width=240, elem_classes="panel"):
                gr.Markdown(f"#### {words('chat_settings')}")
                self.options = self._panel()
        self.histories = gr.State(_EMPTY)
        self._wire()

    def _dropdown(self, key: str, value: str, *, wanted: bool) -> gr.Dropdown:
        words = self._words
        return gr.Dropdown(
            self._choices(wanted),
            value=value if value or not wanted else None,
            label=words(key),
            allow_custom_value=True,
            elem_id=key.replace("_", "-"),
            interactive=True,
        )

    def _choices(self, wanted: bool) -> list[tuple[str, str]]:
        none = [] if wanted else [(self._words("nothing"), _NONE)]
        return [*none, *((choice.label, choice.value) for choice in self._site.pool.choices())]

    def _chatbot(self, side: str, *, visible: bool) -> gr.Chatbot:
        return gr.Chatbot(
            show_label=visible and side == "right",
            visible=visible,
            height="max(320px, calc(100vh - 420px))",
            min_height=320,
            elem_id=side,
            editable="user",
            buttons=["copy"],
            placeholder=self._words("chat_empty"),
            allow_file_downloads=False,
            feedback_options=None,
            layout="bubble",
            min_width=280,
        )

    def _make_request(self) -> None:
        """The row that asks whether a call may run."""
        with gr.Row(visible=False, elem_id="request", elem_classes="request") as self.request:
            self.call = gr.HTML(elem_id="request-call", padding=False)
            # the browser sends the number that it shows, so that a click allows nothing else
            self.number = gr.Number(visible="hidden", precision=0)
            self.replies: dict[Reply, gr.Button] = {
                reply: gr.Button(
                    self._words(f"call_{reply}"),
                    size="sm",
                    variant="primary" if reply == "yes" else "secondary",
                    elem_id=f"call-{reply}",
                )
                for reply in ("yes", "always", "no")
            }

    def _panel(self) -> list[Any]:
        words, tools = self._words, self._site.tools
        names = ", ".join(tools.box.names) if tools else ""
        named = [name for name in templates.names() if name != AS_TRAINED]
        return [
            gr.Textbox(label=words("chat_system"), lines=2, max_lines=8, elem_id="system"),
            gr.Slider(8, 32768, 2048, step=8, label=words("chat_max_length"),
                      info=words("chat_max_length_hint"), elem_id="max-length"),
            gr.Slider(0.01, 1, 0.75, step=0.01, label=words("chat_top_p"),
                      info=words("chat_top_p_hint"), elem_id="top-p"),
            gr.Slider(0, 2, 0.1, step=0.05, label=words("chat_temperature"),
                      info=words("chat_temperature_hint"), elem_id="temperature"),
            gr.Dropdown([(words("chat_template_auto"), AS_TRAINED), *named], value=AS_TRAINED,
                        label=words("chat_template"), elem_id="template"),
            gr.Checkbox(bool(tools), visible=bool(tools), label=words("chat_tools"), info=names,
                        elem_id="tools"),
        ]  # fmt: skip

    def _wire(self) -> None:
        """Connect events with what they do; none is offered as an API."""
        both = [self.left, self.right, self.histories]
        chosen = [self.model, self.other]
        free = {"concurrency_limit": None, **PRIVATE}
        for dropdown in chosen:
            dropdown.change(self._open, chosen, self._opened, **free)
        inputs = [self.question, self.histories, *chosen, *self.options]
        request = [self.request, self.call, self.number]
        outputs = [*both, self.question, self.status, self.note, *request]
        self.question.submit(self._ask, inputs, outputs, **free)
        self.retry.click(self._retry, inputs, outputs, **free)
        for chatbot in (self.left, self.right):
            chatbot.retry(self._retry, inputs, outputs, **free)
            chatbot.edit(self._edit, inputs, outputs, **free)
            chatbot.clear(self._clear, None, both, **PRIVATE)
        self.stop.click(self._stop, None, None, **free)
        self.clear.click(self._clear, None, both, **PRIVATE)
        for reply, button in self.replies.items():
            button.click(self._replier(reply), self.number, self.request, **free)

    @property
    def _opened(self) -> list[Any]:
        """What `_open` updates."""
        return [self.status, self.left, self.right, self.question, self.options[0], self.histories]

    def wire_page(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Load the first model when the page opens, offer new models when the tab is selected, and
        stop answers when the page is closed."""
        chosen = [self.model, self.other]
        page.load(self._open, chosen, self._opened, concurrency_limit=None, **PRIVATE)
        for event in (page.load, tab.select):
            event(self._refreshed, None, chosen, **PRIVATE)
        page.unload(self._closed)

    def _refreshed(self) -> _Updates:
        return gr.update(choices=self._choices(True)), gr.update(choices=self._choices(False))

    def _open(self, model: str | None, other: str | None) -> Iterator[_Updates]:
        """Load the chosen models; the page stays usable and shows how long it takes."""
        labels = {"visible": bool(other), "show_label": bool(other), "value": []}
        right = gr.update(**labels)
        left = gr.update(show_label=bool(other), value=[])
        if not model:
            status = hint(self._words("chat_no_model"))
            yield {self.status: status, self.left: left, self.right: right, self.histories: _EMPTY}
            return
        try:
            openings = [self._site.pool.open(value) for value in (model, other) if value]
            left["label"], right["label"] = openings[0].name, openings[-1].name
            yield {self.left: left, self.right: right, self.histories: _EMPTY}
            for opening in openings:
                while not opening.finished.is_set():
                    yield {self.status: self._bar(opening)}
                    opening.finished.wait(_POLL_SECONDS)
            served = [opening.result() for opening in openings]
        except XTunerError as error:
            yield {self.status: fault(error), self.histories: _EMPTY}
            return
        takes_images = all(each.vision is not None for each in served)
        names = " · ".join(opening.name for opening in openings)
        yield {
            self.status: f'<h2 class="model">{escape(names)}</h2>',
            self.question: gr.update(sources=["upload"] if takes_images else []),
            self.options[0]: served[0].template.system,
        }

    def _bar(self, opening: Opening) -> str:
        return working(self._words("chat_loading", name=opening.name, seconds=opening.seconds))

    def _ask(
        self, request: gr.Request, question: dict[str, Any], histories: Any, *settings: Any
    ) -> Iterator[_Updates]:
        """Answer a question on all sides."""
        text, files = question.get("text", "").strip(), tuple(question.get("files") or ())
        if text or files:
            yield from self._answer(text, files, histories, settings, request)
        else:
            yield gr.skip()

    def _retry(
        self, request: gr.Request, question: Any, histories: Any, *settings: Any
    ) -> Iterator[_Updates]:
        """Ask the last question again."""
        yield from self._again(-1, None, histories, settings, request)

    def _edit(
        self,
        request: gr.Request,
        edit: gr.EditData,
        question: Any,
        histories: Any,
        *settings: Any,
    ) -> Iterator[_Updates]:
        """Ask an edited question, and forget what came after it."""
        index = edit.index if isinstance(edit.index, int) else edit.index[0]
        text = edit.value if isinstance(edit.value, str) else str(edit.value)
        number = bubbles.question_at(histories[0], index, self._words)
        yield from self._again(number, text, histories, settings, request)

    def _again(
        self,
        number: int,
        text: str | None,
        histories: Sequence[History],
        settings: Sequence[Any],
        request: gr.Request,
    ) -> Iterator[_Updates]:
        """Ask question `number` again, with `text` if it is given."""
        asked = bubbles.questions(histories[0])
        if not asked or number >= len(asked):
            yield gr.skip()
            return
        message: Message = asked[number]
        earlier = tuple(bubbles.before(history, number) for history in histories)
        question = bubbles.text_of(message) if text is None else text
        yield from self._answer(question, message.images, earlier, settings, request)

    def _answer(
        self,
        text: str,
        images: Sequence[str],
        histories: Sequence[History],
        settings: Sequence[Any],
        request: gr.Request,
    ) -> Iterator[_Updates]:
        model, other, *options = settings
        try:
            if not model:
                raise ConfigError(self._words("chat_no_model"))
            served = [self._site.pool.open(v).result() for v in (model, other) if v]
            asked = self._asked(text, images, options)
        except XTunerError as error:
            yield {self.status: fault(error)}
            return
        earlier = [tuple(history) for history in histories][: len(served)]
        before = [bubbles.of_history(history, self._words) for history in earlier]
        shown = [[*entries, *bubbles.of_question(asked)] for entries in before]
        yield {**self._windows(shown), self.question: gr.update(value=None), self.note: ""}
        turn = self._site.turns.begin(request.session_hash or "")
        sides: list[Side] = []
        for sides in answer(self._site.engine, served, earlier, asked, turn):
            now = [[*entries, *bubbles.of_side(side, self._words)]
                   for entries, side in zip(shown, sides, strict=True)]  # fmt: skip
            yield {**self._windows(now), **self._requested(sides)}
        if errors := "\n".join(side.error for side in sides if side.error):
            yield {
                **self._windows(before),
                self.question: gr.update(value={"text": text, "files": list(images)}),
                self.status: fault(ConfigError(errors)),
            }
            return
        after = [side.history or () for side in sides]
        shown = [bubbles.of_history(history, self._words) for history in after]
        yield {**self._windows(shown), self.histories: (*after, ())[:2], **self._noted(sides)}

    def _asked(self, text: str, images: Sequence[str], options: Sequence[Any]) -> Asked:
        system, max_length, top_p, temperature, template, tools = options
        return Asked(
            text,
            tuple(images),
            GenerationOptions(
                max_new_tokens=int(max_length),
                temperature=float(temperature),
                top_p=float(top_p) if temperature and top_p < 1 else None,
            ),
            system or "",
            template,
            self._site.tools if tools else None,
        )

    def _windows(self, sides: Sequence[Any]) -> dict[Any, Any]:
        """Both chat windows; an unused one stays as it is."""
        return dict(zip((self.left, self.right), sides, strict=False))

    def _requested(self, sides: Sequence[Side]) -> dict[Any, Any]:
        """The row that asks for the first call that waits."""
        request = next((side.request for side in sides if side.request), None)
        if request is None:
            return {self.request: gr.update(visible=False)}
        question = self._words("call_question", tool=plain_name(request.call))
        shown: Mapping[Any, Any] = {
            self.request: gr.update(visible=True),
            self.call: hint(question),
            self.number: request.number,
        }
        return dict(shown)

    def _noted(self, sides: Sequence[Side]) -> dict[Any, Any]:
        """Notes on answers without tools, and on those that had too many rounds of calls."""
        notes = ""
        if any(side.without_tools for side in sides):
            notes += hint(self._words("chat_without_tools"))
        if rounds := max((side.rounds for side in sides), default=0):
            notes += hint(self._words("chat_rounds", rounds=rounds))
        return {self.note: notes}

    def _replier(self, reply: Reply) -> Any:
        def replied(number: float | None, request: gr.Request) -> _Updates:
            self._site.turns.reply(request.session_hash or "", int(number or 0), reply)
            return gr.update(visible=False)

        return replied

    def _stop(self, request: gr.Request) -> None:
        self._site.turns.stop(request.session_hash or "")

    def _closed(self, request: gr.Request) -> None:
        self._site.turns.forget(request.session_hash or "")

    def _clear(self, request: gr.Request) -> _Updates:
        self._site.turns.stop(request.session_hash or "")
        return [], [], _EMPTY
