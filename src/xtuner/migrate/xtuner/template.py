"""Translate the template of an old config: a known name, or a file next to the settings file."""

from __future__ import annotations

from typing import Any

from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Dotted, Table, written
from xtuner.migrate.xtuner.names import names

END = "_template.py"
"""Suffix of the file with a custom template."""
_KNOWN = ("SYSTEM", "INSTRUCTION", "SUFFIX", "SUFFIX_AS_EOS", "SEP", "STOP_WORDS")


def carry_template(template: Any, line: int, config: Table, draft: Draft) -> None:
    """Set `prompt_template` so that the text stays the same."""
    if isinstance(template, Table):
        _own(template, line, draft)
        return
    name = written(template) if isinstance(template, Dotted) else str(template)
    ours = names("templates").get(name.rpartition("PROMPT_TEMPLATE.")[2])
    if ours is None:
        draft.refuse(line, shown("template", template), "is not a known template")
        return
    if (
        ours == "xtuner0_qwen_chat"
        and "qwen" in str(draft.values.get("pretrained_model_name_or_path", "")).lower()
    ):
        ours = "qwen_chat"  # equivalent if the tokenizer has no bos token
    draft.set("prompt_template", ours, line)
    _end_token(ours, config, draft)


def _end_token(ours: str, config: Table, draft: Draft) -> None:
    """Report an eos_token that the config sets, if answers end with it."""
    tokenizer = config.table("tokenizer")
    eos = tokenizer.take("eos_token")
    if eos and ours in _ENDING_WITH_EOS:
        draft.note(
            tokenizer.line_of("eos_token"),
            f"eos_token = {eos!r}",
            "answers end with the eos_token in the tokenizer_config.json of the model; change it "
            "there if it differs",
        )


_ENDING_WITH_EOS = frozenset(
    f"xtuner0_{name}"
    for name in (
        "baichuan2_chat baichuan_chat chatglm2 chatglm3 code_llama_chat deepseek_coder default "
        "gemma llama2_chat minicpm mistral vicuna wizardcoder zephyr"
    ).split()
)


def _own(template: Table, line: int, draft: Draft) -> None:
    """Write a custom template next to the settings file."""
    unknown = [key for key in template if key not in _KNOWN]
    question = template.take("INSTRUCTION")
    if unknown or not isinstance(question, str) or "{input}" not in question:
        draft.refuse(line, shown("template", template), "is not a template of XTuner 0.x")
        return
    draft.files[END] = spec_source(
        system=str(template.take("SYSTEM", "{system}\n")),
        question=question,
        suffix=str(template.take("SUFFIX", "") or ""),
        suffix_ends=bool(template.take("SUFFIX_AS_EOS", False)),
        sep=str(template.take("SEP", "") or ""),
        stop_words=tuple(template.take("STOP_WORDS", ()) or ()),
    )
    draft.set("prompt_template", f"{{stem}}{END}:TEMPLATE", line)


def spec_source(
    *,
    system: str,
    question: str,
    suffix: str,
    suffix_ends: bool,
    sep: str,
    stop_words: tuple[str, ...],
) -> str:
    """Source of a Python file with a `Spec` that is equivalent to the old template.

    Args:
        system: SYSTEM of the old template, with ``{system}``.
        question: INSTRUCTION, with ``{input}`` and optionally ``{round}``.
        suffix: SUFFIX, appended to each answer.
        suffix_ends: SUFFIX_AS_EOS: no end token follows the suffix.
        sep: SEP, which is not trained on.
        stop_words: STOP_WORDS.
    """
    ends = suffix_ends and bool(suffix)
    first = "" if ends else "{bos}"
    before, _, after = question.partition("{input}")
    stop = suffix or "{eos}"
    pieces = {
        "start": "{bos}" if ends else "",
        "system_in_user": first + system + before.replace("{round}", "1") + "{content}",
        "user": first + before + "{content}",
        "assistant": after,
        "answer": "{content}" + suffix + ("" if ends else "{eos}"),
        "stop": stop,
        "after": sep,
    }
    lines = [f"    {name}={text!r}," for name, text in pieces.items()]
    words = tuple(word for word in stop_words if word != stop)
    lines += [f"    stop_words={words!r},"] if words else []
    head = '"""The template of the migrated config next to this file."""\n\n'
    body = "\n".join(["TEMPLATE = Spec(", *lines, ")"])
    return f"{head}from xtuner.templates.spec import Spec\n\n{body}\n"
