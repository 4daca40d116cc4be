"""The tab Chat: one conversation, or two side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from xtuner import templates
from xtuner.errors import ConfigError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.i18n import Words
from xtuner.types import IMAGE, Message
from xtuner.web.conversation import AS_TRAINED, Asked, History, Side, answer
from xtuner.web.models import Opening
from xtuner.web.site import Site

CURSOR = "▌"
_NONE = ""
_POLL_SECONDS = 0.3
_Updates = Any


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
        self.histories = gr.State(((), ()))
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

    def _panel(self) -> list[Any]:
        words = self._words
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
        ]  # fmt: skip

    def _wire(self) -> None:
        """Connect events with what they do; none is offered as an API."""
        both = [self.left, self.right, self.histories]
        chosen = [self.model, self.other]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        free = {"concurrency_limit": None, **hidden}
        shown = [self.status, self.left, self.right, self.question, self.options[0]]
        for dropdown in chosen:
            dropdown.change(self._open, chosen, [*shown, self.histories], **free)
            dropdown.focus(self._refreshed, None, chosen, **hidden)
        inputs = [self.question, self.histories, *chosen, *self.options]
        outputs = [*both, self.question, self.status]
        self.question.submit(self._ask, inputs, outputs, **free)
        self.retry.click(self._retry, inputs, outputs, **free)
        for chatbot in (self.left, self.right):
            chatbot.retry(self._retry, inputs, outputs, **free)
            chatbot.edit(self._edit, inputs, outputs, **free)
            chatbot.clear(self._clear, None, [*both, self.status], **hidden)
        self.stop.click(self._stop, None, None, **free)
        self.clear.click(self._clear, None, [*both, self.status], **hidden)

    def wire_page(self, page: gr.Blocks) -> None:
        """Load the first model when the page opens, and stop answers when it is closed."""
        shown = [self.status, self.left, self.right, self.question, self.options[0]]
        page.load(
            self._open,
            [self.model, self.other],
            [*shown, self.histories],
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=None,
        )
        page.unload(self._stop)

    def _refreshed(self) -> _Updates:
        return gr.update(choices=self._choices(True)), gr.update(choices=self._choices(False))

    def _open(self, model: str | None, other: str | None) -> Iterator[_Updates]:
        """Load the chosen models; the page stays usable and shows how long it takes."""
        right = {"visible": bool(other), "show_label": bool(other), "value": []}
        left = {"show_label": bool(other), "value": []}
        if not model:
            text = self._line(self._words("chat_no_model"))
            yield text, gr.update(**left), gr.update(**right), gr.skip(), gr.skip(), ((), ())
            return
        try:
            openings = [self._site.pool.open(value) for value in (model, other) if value]
        except XTunerError as error:
            yield fault(error), gr.update(), gr.update(), gr.skip(), gr.skip(), ((), ())
            return
        left["label"], right["label"] = openings[0].name, openings[-1].name
        first = True
        while waiting := [o for o in openings if not o.finished.is_set()]:
            sides = (gr.update(**left), gr.update(**right)) if first else (gr.skip(), gr.skip())
            yield self._bar(waiting[0]), *sides, gr.skip(), gr.skip(), ((), ())
            first = False
            waiting[0].finished.wait(_POLL_SECONDS)
        try:
            served = [opening.result() for opening in openings]
        except XTunerError as error:
            yield (
                fault(error),
                gr.update(**left),
                gr.update(**right),
                gr.skip(),
                gr.skip(),
                ((), ()),
            )
            return
        sees = all(each.vision is not None for each in served)
        question = gr.update(sources=["upload"] if sees else [])
        names = " · ".join(opening.name for opening in openings)
        title = f'<h2 class="model">{escape(names)}</h2>'
        yield (
            title,
            gr.update(**left),
            gr.update(**right),
            question,
            served[0].template.system,
            (
                (),
                (),
            ),
        )

    def _bar(self, opening: Opening) -> str:
        text = self._words("chat_loading", name=opening.name, seconds=opening.seconds)
        return f'{self._line(text)}<div class="loading"><span></span></div>'

    def _line(self, text: str) -> str:
        return f'<p class="hint">{escape(text)}</p>'

    def _ask(
        self, request: gr.Request, question: dict[str, Any], histories: Any, *settings: Any
    ) -> Iterator[_Updates]:
        """Answer a question on all sides."""
        text, files = question.get("text", "").strip(), tuple(question.get("files") or ())
        if text or files:
            yield from self._answer(text, files, histories, settings, request)
        else:
            yield _nothing()

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
        yield from self._again(_number_of_question(histories, index), text, histories, settings,
                               request)  # fmt: skip

    def _again(
        self,
        number: int,
        text: str | None,
        histories: Sequence[History],
        settings: Sequence[Any],
        request: gr.Request,
    ) -> Iterator[_Updates]:
        """Ask question `number` again, with `text` if it is given."""
        asked = [message for message in histories[0] if message.role == "user"]
        if not asked or number >= len(asked):
            yield _nothing()
            return
        message = asked[number]
        before = tuple(_before(history, number) for history in histories)
        said = _text_of(message) if text is None else text
        yield from self._answer(said, message.images, before, settings, request)

    def _answer(
        self,
        text: str,
        images: Sequence[str],
        histories: Sequence[History],
        settings: Sequence[Any],
        request: gr.Request,
    ) -> Iterator[_Updates]:
        model, other, system, max_length, top_p, temperature, template = settings
        values = [value for value in (model, other) if value]
        try:
            if not model:
                raise ConfigError(self._words("chat_no_model"))
            served = [self._site.pool.open(value).result() for value in values]
            asked = Asked(
                text,
                tuple(images),
                GenerationOptions(
                    max_new_tokens=int(max_length),
                    temperature=float(temperature),
                    top_p=float(top_p) if temperature and top_p < 1 else None,
                ),
                system or "",
                template,
            )
        except XTunerError as error:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), fault(error)
            return
        before = [tuple(history) for history in histories][: len(served)]
        shown = [[*_shown(history), *_shown_question(asked)] for history in before]
        yield *_two(shown), gr.skip(), gr.update(value=None), gr.skip()
        stop = self._site.stops.begin(request.session_hash or "")
        sides: list[Side] = []
        for sides in answer(self._site.engine, served, before, asked, stop):
            now = [[*said, *_shown_answer(side)] for said, side in zip(shown, sides, strict=True)]
            yield *_two(now), gr.skip(), gr.skip(), gr.skip()
        if errors := "\n".join(side.error for side in sides if side.error):
            yield (
                *_two([_shown(history) for history in before]),
                gr.skip(),
                gr.update(value={"text": text, "files": list(images)}),
                fault(ConfigError(errors)),
            )
            return
        after = [side.history or () for side in sides]
        padded = (*after, ()) if len(after) == 1 else tuple(after)
        yield *_two([_shown(history) for history in after]), padded, gr.skip(), gr.skip()

    def _stop(self, request: gr.Request) -> None:
        self._site.stops.stop(request.session_hash or "")

    def _clear(self, request: gr.Request) -> _Updates:
        self._site.stops.stop(request.session_hash or "")
        return [], [], ((), ()), gr.skip()


def _nothing() -> _Updates:
    return (gr.skip(),) * 5


def _two(sides: Sequence[Any]) -> tuple[Any, Any]:
    """Both chat windows; an unused one stays as it is."""
    return (sides[0], sides[1]) if len(sides) == 2 else (sides[0], gr.skip())


def _shown(history: History) -> list[dict[str, Any]]:
    """A conversation as the chat window shows it."""
    turns: list[dict[str, Any]] = []
    for message in history:
        turns += [{"role": message.role, "content": {"path": path}} for path in message.images]
        if text := _text_of(message):
            turns.append({"role": message.role, "content": text})
    return turns


def _shown_question(asked: Asked) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": {"path": path}} for path in asked.images
    ]
    return [*turns, {"role": "user", "content": asked.text}] if asked.text else turns


def _shown_answer(side: Side) -> list[dict[str, Any]]:
    cursor = "" if side.history is not None else CURSOR
    return [{"role": "assistant", "content": side.text + cursor}]


def _text_of(message: Message) -> str:
    """The text of a message without the placeholders of its images."""
    if not message.images:
        return message.content
    return message.content.replace(IMAGE, "").strip()


def _before(history: History, number: int) -> History:
    """The conversation before its question `number`; negative ones count from the end."""
    places = [i for i, message in enumerate(history) if message.role == "user"]
    return history[: places[number]] if -len(places) <= number < len(places) else history


def _number_of_question(histories: Sequence[History], index: int) -> int:
    """Which question the shown turn `index` belongs to."""
    count, turn = -1, -1
    for message in histories[0]:
        turn += len(message.images) + bool(_text_of(message))
        count += message.role == "user"
        if turn >= index:
            return count
    return count


def fault(error: Exception) -> str:
    """An error as the page shows it."""
    return f'<pre class="fault">{escape(str(error))}</pre>'
