"""Export templates as Jinja chat templates, which other tools load with a model.

The content of a message is a string, or a list of parts ``{"type": "text", "text": ...}`` and
``{"type": "image"}``; an image is rendered as ``<image>`` and a line break, as in training.
"""

from __future__ import annotations

import json
import re
from typing import Any

from xtuner.templates.base import Template
from xtuner.templates.named import NamedTemplate
from xtuner.templates.plain import PlainText
from xtuner.types import IMAGE

_FIELD = re.compile(r"\{(content|system|round)\}")


def as_jinja(template: Template, tokenizer: Any) -> str:
    """A Jinja chat template with the same output as `template`, including its system message.

    Args:
        template: 'auto', 'plain' or a named template.
        tokenizer: The tokenizer, which has the chat template of 'auto'.
    """
    if isinstance(template, NamedTemplate):
        return _MESSAGES + _system(template.system) + _named(template)
    if isinstance(template, PlainText):
        return _MESSAGES + _plain(template)
    source = tokenizer.chat_template
    chat_template = source if isinstance(source, str) else source["default"]
    return _MESSAGES + _system(template.system) + str(chat_template)


_MESSAGES = (
    "{%- set ns = namespace(all=[], text='', round=0, system='', closed=false) -%}"
    "{%- for m in messages -%}{%- set ns.text = '' -%}"
    "{%- if m['content'] is string -%}{%- set ns.text = m['content'] -%}{%- else -%}"
    "{%- for part in m['content'] or [] -%}"
    f"{{%- set ns.text = ns.text + ({json.dumps(IMAGE + chr(10))} if part['type'] == 'image' "
    "else part['text'] or '') -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set ns.all = ns.all + [dict(m, content=ns.text)] -%}{%- endfor -%}"
    "{%- set messages = ns.all -%}"
)
"""Replaces `messages` with messages whose contents are strings."""


def _system(text: str) -> str:
    """Prepends the template's system message to conversations that have none."""
    if not text:
        return ""
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}{%- set messages = "
        f"[{{'role': 'system', 'content': {json.dumps(text)}}}] + messages -%}}{{%- endif -%}}"
    )


def _named(template: NamedTemplate) -> str:
    spec = template.spec
    if spec.system_in_user:
        system = "{%- set ns.system = m['content'] -%}"
        with_system = _say(_joined(spec.system_in_user))
        user = f"{{%- if ns.system -%}}{with_system}{{%- else -%}}{{}}{{%- endif -%}}"
        user += "{%- set ns.system = '' -%}"
    else:
        system, user = _say(_joined(spec.system)), "{}"
    plain = _say(_joined(spec.user))
    if spec.stop_opens_next:
        short = _say(_joined(spec.user[len(spec.stop) :]))
        plain = f"{{%- if ns.closed -%}}{short}{{%- else -%}}{plain}{{%- endif -%}}"
    user = user.replace("{}", plain)
    return (
        f"{_say(_joined(spec.start))}{{%- for m in messages -%}}"
        "{%- if m['role'] == 'assistant' -%}"
        f"{_say(_joined(spec.assistant + spec.answer + spec.after))}"
        "{%- set ns.closed = true -%}"
        f"{{%- elif m['role'] == 'system' -%}}{system}"
        "{%- else -%}{%- set ns.round = ns.round + 1 -%}"
        f"{user}{{%- set ns.closed = false -%}}{{%- endif -%}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{_say(_joined(spec.assistant))}{{%- endif -%}}"
    )


def _plain(template: PlainText) -> str:
    begin, end, between = template.markers
    system = template.system and template.system + between
    return (
        f"{_say(json.dumps(begin))}"
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{_say(json.dumps(system))}{{%- endif -%}}"
        "{%- for m in messages -%}{{- m['content'] -}}"
        f"{{%- if m['role'] == 'assistant' -%}}{_say(json.dumps(end + between))}"
        f"{{%- elif m['role'] == 'system' -%}}{_say(json.dumps(between))}{{%- endif -%}}"
        "{%- endfor -%}"
    )


def _say(expression: str) -> str:
    return f"{{{{- {expression} -}}}}" if expression != '""' else ""


def _joined(piece: str) -> str:
    """`piece` as a Jinja expression."""
    values = {"content": "m['content']", "system": "ns.system", "round": "ns.round | string"}
    parts = []
    for number, text in enumerate(_FIELD.split(piece)):
        if number % 2:
            parts.append(f"({values[text]})")
        elif text:
            parts.append(json.dumps(text))
    return " ~ ".join(parts) or '""'
