"""The settings as a form, generated from their schema.

Settings ──fields──► kind of control ──shown──► what the browser shows ──read──► value
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from xtuner import i18n, plugins
from xtuner.config.describe import allowed, choices, is_dict
from xtuner.config.load import LoadedSettings, load_settings
from xtuner.config.render import literal, render
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError, listed
from xtuner.web.folders import Folders

Kind = Literal["switch", "choice", "text", "lines", "value"]
"""A control: on or off; one of a few; a string; strings, one per line; any Python literal."""


@dataclass(frozen=True)
class Field:
    """A setting in the form.

    Attributes:
        name: Name of the setting.
        part: Heading of its group.
        kind: Its kind of control.
        help: Its description and the values that it takes.
        options: The options of a 'choice'.
        common: It appears in copied settings files, and is shown first.
    """

    name: str
    part: str
    kind: Kind
    help: str
    options: tuple[str, ...] = ()
    common: bool = False


def fields(words: i18n.Words | None = None) -> list[Field]:
    """All settings, in the order of a settings file, described with `words`; None is English."""
    words = words or i18n.words("en")
    return [
        _field(name, " ".join(str(part.__doc__).split()[2:]), words)
        for part in Settings.parts()
        for name in part.model_fields
    ]


def _field(name: str, part: str, words: i18n.Words) -> Field:
    info, kind = Settings.model_fields[name], _kind(name)
    text = words.of_setting("settings", " ".join((info.description or "").split()), key=name)
    if kind not in ("switch", "choice"):  # whose controls show what can be chosen
        values = words.of_setting("values", allowed(name))
        text = words("train_values", text=text, values=values)
    return Field(
        name,
        words.of_setting("parts", part),
        kind,
        text,
        _options(name),
        Settings.mark(name).comment is not None,
    )


def _kind(name: str) -> Kind:
    annotation = Settings.model_fields[name].annotation
    words = allowed(name)
    if annotation is bool:
        return "switch"
    if choices(name) and _only_choices(annotation):
        return "choice"
    if words in ("a string", "a string, or None"):
        return "text"
    if not is_dict(name) and words in ("a string or a list of strings", "a list of strings"):
        return "lines"
    return "value"


def _only_choices(annotation: Any) -> bool:
    """Whether `annotation` is a union of literals, bool and None."""
    if get_origin(annotation) in (Union, UnionType):
        return all(_only_choices(member) for member in get_args(annotation))
    return annotation in (bool, NoneType) or get_origin(annotation) is Literal


def _options(name: str) -> tuple[str, ...]:
    if not choices(name):
        return ()
    members = get_args(Settings.model_fields[name].annotation)
    more = ("True", "False") if bool in members else ()
    none = ("None",) if NoneType in members else ()
    return (*choices(name), *more, *none)


def shown(field: Field, value: Any) -> Any:
    """What the control of `field` shows for `value`."""
    if field.kind == "switch":
        return bool(value)
    if field.kind == "choice":
        return str(value)
    if field.kind == "text":
        return "" if value is None else value
    if field.kind == "lines":
        return "\n".join([value] if isinstance(value, str) else value)
    return value if isinstance(value, str) else literal(field.name, value)


def read(field: Field, given: Any) -> Any:
    """The value of `field` that its control shows as `given`.

    Raises:
        ConfigError: It is not a literal.
    """
    if field.kind == "switch":
        return bool(given)
    text = str(given or "").strip()
    if field.kind == "choice":
        words = {"True": True, "False": False, "None": None}
        return words.get(text, text)
    if field.kind == "text":
        default = Settings.model_fields[field.name].default
        return None if not text and default is None else text
    if field.kind == "lines":
        return [line for line in (line.strip() for line in text.splitlines()) if line]
    if text in choices(field.name):
        return text
    try:
        return ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{field.name} = {text!r}: must be {allowed(field.name)}") from None


def defaults() -> dict[str, Any]:
    """The default of each setting; an empty one for those that have none."""
    return {name: _default(name) for name in Settings.model_fields}


def _default(name: str) -> Any:
    info = Settings.model_fields[name]
    if info.is_required():
        return () if _kind(name) == "lines" else ""
    return dict(info.default) if is_dict(name) else info.default


def values_of(given: Sequence[Any]) -> dict[str, Any]:
    """The settings of a form whose controls show `given`, in the order of `fields`; those at their
    defaults are left out.

    Raises:
        ConfigError: Controls have invalid values; all are listed.
    """
    found, problems = {}, []
    for field, value in zip(fields(), given, strict=True):
        try:
            found[field.name] = read(field, value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(listed("the form:", problems))
    standard = defaults()
    return {
        name: value
        for name, value in found.items()
        if not _same(value, standard[name]) or Settings.model_fields[name].is_required()
    }


def controls_of(values: Mapping[str, Any]) -> list[Any]:
    """What all controls show for `values`, in the order of `fields`."""
    complete = {**defaults(), **values}
    return [shown(field, complete[field.name]) for field in fields()]


def checked(values: Mapping[str, Any], folders: Folders) -> LoadedSettings:
    """The settings `values`, checked also for paths outside the folders and for code.

    Raises:
        ConfigError: All problems are listed.
    """
    loaded = load_settings(values)
    problems = [*_outside_paths(loaded.settings, folders), *_code(loaded.settings)]
    if problems:
        raise ConfigError(listed("settings that the page does not accept:", problems))
    return loaded


_READS = ("image_folder", "evaluation_images", "strategy")
"""Settings that are not marked as paths, but may name files that a run reads."""


def _outside_paths(settings: Settings, folders: Folders) -> list[str]:
    """Settings that name something outside the folders."""
    problems = []
    for name in (*Settings.paths(), *_READS):
        for text in _texts(settings, name):
            try:
                folders.check(text)
            except ConfigError as error:
                problems.append(f"{name}: {error}")
    if settings.work_dir is not None:
        problems.append("work_dir: the page names it after the run; leave it empty")
    return problems


def _texts(settings: Settings, name: str) -> list[str]:
    """The strings of a setting that is a string or a list of strings."""
    value = getattr(settings, name)
    members = value if isinstance(value, tuple) else (value,)
    return [text for text in members if isinstance(text, str) and text]


def _code(settings: Settings) -> list[str]:
    """Settings that would run code that comes neither from xtuner nor from this machine's user."""
    elsewhere = "start that run with the command line"
    problems = []
    if settings.trust_remote_code:
        problems.append(f"trust_remote_code: runs code of the model; {elsewhere}")
    if "/" in settings.attn_implementation:
        kernel = settings.attn_implementation
        problems.append(f"attn_implementation = {kernel!r}: runs code from the hub; {elsewhere}")
    for name in Settings.model_fields:
        for text in _texts(settings, name):
            if plugins.is_user_path(text):
                problems.append(f"{name} = {text!r}: runs a Python file; {elsewhere}")
    return problems


def settings_file(values: Mapping[str, Any], name: str) -> str:
    """The settings file of a run called `name`."""
    return render(values, title=f"Settings of {name}, made on the page of xtuner web")


def _same(left: Any, right: Any) -> bool:
    as_list = [list(v) if isinstance(v, list | tuple) else v for v in (left, right)]
    return bool(as_list[0] == as_list[1]) and type(as_list[0]) is type(as_list[1])
