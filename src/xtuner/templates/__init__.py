"""Prompt templates: render messages to token ids, a loss mask and prompts.

'auto' is the tokenizer's own chat template, 'plain' adds only an EOS token after answers, and
'verbatim' adds nothing. Named templates are rows of `table.py`; your own is a `Spec` given as
``"my_templates.py:MINE"``. Listing names imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner import plugins
from xtuner.errors import ConfigError, ModelError, count, did_you_mean, listed
from xtuner.templates.spec import Spec
from xtuner.templates.table import NAMED
from xtuner.templates.xtuner0 import XTUNER0

if TYPE_CHECKING:
    from xtuner.config.schema import Settings
    from xtuner.templates.base import Template
    from xtuner.types import Algorithm

logger = logging.getLogger("xtuner.templates")
SETTING = "prompt_template"


def names() -> list[str]:
    """The values of the setting `prompt_template`, 'auto' and 'plain' first."""
    return ["auto", "plain", "verbatim", *sorted(NAMED), *sorted(XTUNER0)]


def of_run(
    settings: Settings, tokenizer: Any, *, algorithm: Algorithm, folder: Path | None = None
) -> Template:
    """The template of a run, which its checkpoints record.

    It is the one in the settings; 'auto' selects 'plain' if the algorithm continues texts and the
    model has no chat template.

    Raises:
        ConfigError, ModelError: See `load`.
    """
    name = settings.prompt_template
    if name == "auto" and algorithm.continues_text and not tokenizer.chat_template:
        name = "plain"
    return load(name, tokenizer, system=settings.SYSTEM, folder=folder)


def load(name: str, tokenizer: Any, *, system: str = "", folder: Path | None = None) -> Template:
    """Load a template for a tokenizer.

    Args:
        name: 'auto', 'plain', 'verbatim', a named template, or the user's own as
            ``"my_templates.py:MINE"`` (a `Spec`).
        system: The system message of conversations that have none.
        folder: Where to look for the user's file before the working directory.

    Raises:
        ConfigError: There is no such template, or the user's object is not a valid `Spec`.
        ModelError: The template does not work with this tokenizer.
    """
    if name == "auto":
        from xtuner.templates.auto import ChatTemplate

        return ChatTemplate(tokenizer, system=system)
    if name == "plain":
        from xtuner.templates.plain import PlainText

        return PlainText(tokenizer, system=system)
    if name == "verbatim":
        from xtuner.templates.plain import Verbatim

        return Verbatim(tokenizer, system=system)
    from xtuner.templates.named import NamedTemplate

    if plugins.is_user_path(name):
        spec = _user_spec(name, folder)
    elif name in NAMED or name in XTUNER0:
        spec = (NAMED | XTUNER0)[name]
    else:
        raise ConfigError(
            f"{SETTING} = {name!r}: must be one of {', '.join(names())}, "
            f"or 'my_templates.py:object'{did_you_mean(name, names())}"
        )
    return NamedTemplate(name, tokenizer, spec=spec, system=system)


def of_checkpoint(
    name: str,
    tokenizer: Any,
    *,
    fields: Mapping[str, Any],
    system: str,
    where: str,
    trust_code: bool = False,
) -> Template:
    """The template that a checkpoint names. It may be untrusted, so it runs no Python file
    unless `trust_code` is set.

    Args:
        name: As in `load`.
        fields: Fields of the `Spec` if the template was the user's own; the file that `name`
            names is then not needed.
        system: The system message of conversations that have none.
        where: The checkpoint, for messages.
        trust_code: Run the Python file that `name` names, if there are no `fields`.

    Raises:
        ConfigError, ModelError: As `load`; or the file may not be run.
    """
    if not plugins.is_user_path(name):
        return load(name, tokenizer, system=system)
    if fields:
        from xtuner.templates.named import NamedTemplate

        try:
            spec = Spec.from_fields(fields)
        except ValueError as error:
            raise ModelError(f"{where}: the template in its run.yaml: {error}") from None
        return NamedTemplate(name, tokenizer, spec=spec, system=system)
    file = Path(name.rpartition(":")[0]).expanduser().absolute()
    if not trust_code:
        raise ModelError(
            f"{where}: its run.yaml names a template in a Python file, {file}, which is not run: a "
            "checkpoint may come from anyone. If you have read that file and trust it, add "
            "--trust-code; or give a template that you know: --prompt-template NAME"
        )
    logger.warning("running %s, which the run.yaml of %s names (--trust-code)", file, where)
    return load(name, tokenizer, system=system)


def _user_spec(name: str, folder: Path | None) -> Spec:
    spec = plugins.load_user_object(name, setting=SETTING, folder=folder)
    if not isinstance(spec, Spec):
        raise ConfigError(
            f"{SETTING} = {name!r}: is of type {type(spec).__name__}; "
            "it must be a Spec (from xtuner.templates.spec import Spec)"
        )
    if problems := list(spec.problems()):
        headline = f"{SETTING} = {name!r}: {count(len(problems), 'problem')}"
        raise ConfigError(listed(headline, problems))
    return spec
