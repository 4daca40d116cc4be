"""Settings as the commands load them; third-party code needs a flag.

`trust_remote_code = True` in a settings file takes effect after ``--trust-remote-code`` was given
for that model once on this machine. A settings file next to checkpoints that this user's runs did
not write may name Python files only with ``--trust-code``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from xtuner import plugins
from xtuner.cli import _complete
from xtuner.config.load import LoadedSettings, load_settings
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError, listed
from xtuner.hub import trust
from xtuner.parallel.cluster import is_first_process

if TYPE_CHECKING:
    from xtuner.training.data_parts import DataParts

Config: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A settings file or the name of built-in settings.",
        autocompletion=_complete.configs,
    ),
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "--cfg-options", metavar="KEY=VALUE", help="Override a setting; repeatable."
    ),
]
TrustRemoteCode: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let trust_remote_code = True of CONFIG run the Python code of its model. Needed once "
        "per model and machine.",
    ),
]
TrustCode: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run Python files named by settings that lie next to checkpoints."
    ),
]
_MARKS = ("run.yaml", "last_checkpoint", "adapter_config.json", "iter_*")


def load(
    config: str,
    *,
    overrides: Sequence[str] | None,
    trust_remote_code: bool = False,
    trust_code: bool = False,
) -> LoadedSettings:
    """Load settings; refuse those that would run code the user has not agreed to.

    Raises:
        ConfigError: As `load_settings`; or a flag is missing.
    """
    loaded = load_settings(config, overrides=overrides or ())
    return _checked(
        loaded, overrides or (), trust_remote_code=trust_remote_code, trust_code=trust_code
    )


def load_any(
    config: str,
    *,
    overrides: Sequence[str] | None = None,
    reads_data: bool = False,
    trust_remote_code: bool = False,
    trust_code: bool = False,
) -> LoadedSettings:
    """Like `load`, but `config` may also be an unchanged config of another trainer.

    Args:
        reads_data: Whether the command reads rows; some migrated configs need the Python file that
            `xtuner migrate-cfg` writes for this.

    Raises:
        ConfigError: As `load`; or the config cannot be migrated.
    """
    from xtuner.config.read import foreign

    path = Path(config)
    text = ""
    if path.suffix in (".py", ".yaml", ".yml") and path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    if origin := foreign.origin(text, path.suffix):
        from xtuner.migrate import file

        draft = file.read(path)
        if draft.not_yet or draft.refused:
            raise ConfigError(listed(f"{path} ({origin}) cannot be migrated:", [*draft.reasons()]))
        if draft.files and reads_data:
            raise ConfigError(foreign.offer(config, origin))
        loaded = load_settings(draft.values, overrides=overrides or ())
        loaded = replace(loaded, name=path.stem, folder=path.resolve().parent, path=path)
    else:
        loaded = load_settings(config, overrides=overrides or ())
    return _checked(
        loaded, overrides or (), trust_remote_code=trust_remote_code, trust_code=trust_code
    )


def open_data(
    config: str,
    *,
    overrides: Sequence[str] | None,
    trust_remote_code: bool,
    trust_code: bool,
) -> DataParts:
    """Open the data of `config`, which may be one of another trainer; see `load_any`.
    Data of which nothing can be read are reported before torch is imported."""
    from xtuner.training.first_check import check_any_data

    loaded = load_any(
        config,
        overrides=overrides,
        reads_data=True,
        trust_remote_code=trust_remote_code,
        trust_code=trust_code,
    )
    check_any_data(loaded)
    from xtuner.training.data_parts import DataParts

    return DataParts.open(loaded)


def _checked(
    loaded: LoadedSettings, overrides: Sequence[str], *, trust_remote_code: bool, trust_code: bool
) -> LoadedSettings:
    """`loaded`, unless it would run code that the user has not agreed to."""
    _check_remote_code(loaded, overrides, flag=trust_remote_code)
    if not trust_code:
        _check_files(loaded, overrides)
    return loaded


def _check_remote_code(loaded: LoadedSettings, overrides: Sequence[str], *, flag: bool) -> None:
    settings = loaded.settings
    if not settings.trust_remote_code:
        return
    name = trust.canonical(settings.pretrained_model_name_or_path)
    if flag or "trust_remote_code" in _names(overrides):
        trust.remember("remote_code", name)
    elif not trust.is_remembered("remote_code", name):
        raise ConfigError(
            f"{loaded.path or loaded.name}: trust_remote_code = True lets the model {name} run "
            "its own Python code on this machine. If you trust it, add --trust-remote-code, once "
            "per machine; otherwise remove the setting"
        )
    if is_first_process():
        typer.echo(
            f"Warning: running Python code of the model {name} (trust_remote_code).", err=True
        )


def _check_files(loaded: LoadedSettings, overrides: Sequence[str]) -> None:
    """Refuse Python files named by a settings file next to third-party checkpoints."""
    if loaded.path is None or not any(any(loaded.folder.glob(mark)) for mark in _MARKS):
        return
    if trust.is_remembered("work_dirs", str(loaded.folder)):
        return
    given = _names(overrides)
    files = [f"{name} = {value!r}" for name, value in _python(loaded.settings) if name not in given]
    if files:
        raise ConfigError(
            f"{loaded.path}: lies next to checkpoints that your runs on this machine did not "
            f"write, and names Python files, which are not run: {', '.join(files)}. If you have "
            "read them and trust them, add --trust-code"
        )


def _python(settings: Settings) -> Iterator[tuple[str, str]]:
    """The settings that name a user's Python object."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for text in value if isinstance(value, tuple | list) else [value]:
            if isinstance(text, str) and plugins.is_user_path(text):
                yield name, text


def _names(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def remember_work_dir(folder: Path) -> None:
    """Remember that `folder` is written by a run of this user."""
    trust.remember("work_dirs", str(folder.expanduser().resolve()))
