"""Renders a tokenizer's chat template, which is third-party code, within bounds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.errors import DataError, ModelError, XTunerError
from xtuner.templates.bounds import OutOfBoundsError, bounded, check_output
from xtuner.templates.moments import Text, roles

Tools = Sequence[Mapping[str, Any]]

_EXCEEDS = "the tokenizer's chat template exceeds"
_NAME_ANOTHER = "name another, such as prompt_template = 'chatml'"
_PATIENCE = 3
"""So many conversations may exceed the bounds before the template is not rendered any more."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = "26 Jul 2024"
"""The default date of Llama 3 templates; fixed, so that runs are reproducible."""


class Renderer:
    """Renders messages with the chat template of `tokenizer`.

    Attributes:
        variables: What the template gets in addition to the messages.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._exceeded = 0
        self._marked: dict[str, bool] = {}
        self._powers: dict[str, bool] = {}
        dated = "date_string" in self.source()
        self.variables: dict[str, Any] = {"date_string": _DATE} if dated else {}

    def text(self, dicts: list[dict[str, Any]], tools: Tools = (), *, prompt: bool = False) -> Text:
        """The text of messages, given as dicts; with the generation prompt if `prompt`.

        `apply_chat_template` returns the marks only as tokens, so its renderer is called directly.

        Raises:
            DataError: The template rejects the messages.
            ModelError: The template is invalid, or exceeds its bounds.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source(tools)
        variables = dict(self.variables)
        if tools and "xml_tools" in source:
            variables["xml_tools"] = [dict(tool) for tool in tools]  # SmolLM3
        if self._computes_powers(source):
            raise ModelError(
                f"{_EXCEEDS} its bounds: it computes powers (**), which can take hours; "
                f"{_NAME_ANOTHER}"
            )
        if self._exceeded > _PATIENCE:
            raise ModelError(f"{_EXCEEDS} bounds again and again; {_NAME_ANOTHER}")
        try:
            with bounded():
                texts, marks = render_jinja_template(
                    [dicts],
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._is_marked(source),
                    **self._tokenizer.special_tokens_map,
                    **variables,
                )
            check_output(len(texts[0]), given=_characters([dicts, tools]))
        except (OutOfBoundsError, OverflowError) as error:
            self._exceeded += 1
            what = error if isinstance(error, OutOfBoundsError) else f"fails: {error}"
            raise ModelError(f"{_EXCEEDS} its bounds: it {what}; {_NAME_ANOTHER}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the tokenizer's chat template is invalid (line {error.lineno}: {error.message}); "
                f"{_NAME_ANOTHER}"
            ) from error
        except XTunerError:
            raise
        except Exception as error:  # a template can raise anything
            raise DataError(
                f"the model's chat template rejects these messages (roles: {roles(dicts)}): {error}"
            ) from error
        return Text(texts[0], [(a, b) for a, b in marks[0]] if marks else [])

    def source(self, tools: Tools = ()) -> str:
        """The template source; some tokenizers have a separate one for tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[dict(t) for t in tools] or None))
        except ValueError as error:
            raise ModelError(f"prompt_template = 'auto': {error}") from error

    def _computes_powers(self, source: str) -> bool:
        if source not in self._powers:
            self._powers[source] = _has_powers(source)
        return self._powers[source]

    def _is_marked(self, source: str) -> bool:
        if source not in self._marked:
            self._marked[source] = _GENERATION.search(source) is not None
        return self._marked[source]


def _has_powers(source: str) -> bool:
    """Whether the template computes with the operator ``**``: Python cannot interrupt it. Keyword
    arguments, as in ``f(**values)``, are something else."""
    import jinja2

    before = "("
    with contextlib.suppress(jinja2.TemplateSyntaxError):
        for _, kind, text in jinja2.Environment().lex(source):
            if kind == "operator" and text == "**" and before not in ("(", ","):
                return True
            if kind not in ("whitespace", "data"):
                before = text
    return False


def _characters(value: Any) -> int:
    """About how many characters the template is given."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1
