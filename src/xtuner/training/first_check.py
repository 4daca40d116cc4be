"""Checks of a run that need no torch, whose import takes seconds.

Files of the data and their columns, the folder of the model, the names of optimizer and attention.
Everything is checked again where it is used; this module only reports problems sooner.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from xtuner import plugins
from xtuner.config.load import LoadedSettings
from xtuner.config.renames import no_counterpart
from xtuner.config.schema import Settings
from xtuner.data.sources.resolve import of_validation, prepare
from xtuner.errors import ConfigError, DataError, XTunerError, did_you_mean, listed
from xtuner.hub import fetch

_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Values of `attn_implementation`, and the module and package that each requires."""
_NO_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam", "GlobalOptimManager")


def first_check(loaded: LoadedSettings) -> None:
    """Check `loaded` without importing torch.

    Raises:
        XTunerError: A file, folder or name cannot be used; all problems are listed.
    """
    settings = loaded.settings
    problems = [*_problems_of_data(loaded), *map(ConfigError, _problems(settings))]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(listed(f"{len(problems)} problems:", [str(each) for each in problems]))


def check_any_data(loaded: LoadedSettings) -> None:
    """Check that some data can be read and the model's folder exists, without importing torch.

    Raises:
        XTunerError: There is nothing to read, or no model.
    """
    settings, unusable = loaded.settings, list[str]()
    found = prepare(settings, folder=loaded.folder, local=True, unusable=unusable)
    if unusable and not found:
        raise DataError("\n".join(unusable))
    for problem in _problems_of_models(settings):
        raise ConfigError(problem)


def _problems_of_data(loaded: LoadedSettings) -> Iterator[XTunerError]:
    validation = of_validation(loaded.settings)
    for settings in filter(None, (loaded.settings, validation)):
        try:
            prepare(settings, folder=loaded.folder, local=True)
        except XTunerError as error:
            text = str(error).replace("data_path ", "validation_path ")
            yield DataError(text) if settings is validation else error


def _problems_of_models(settings: Settings) -> Iterator[str]:
    for name in ("pretrained_model_name_or_path", "visual_encoder_name_or_path"):
        if (value := getattr(settings, name)) is not None:
            yield from model_problem(name, value)


def _problems(settings: Settings) -> Iterator[str]:
    yield from _problems_of_models(settings)
    known = optimizer_names()
    name = settings.optim_type
    if known and name not in known and not plugins.is_user_path(name):
        instead = no_counterpart("optim_type", name)
        guess = f"; {instead}" if instead else did_you_mean(name, known)
        yield (f"optim_type = {name!r}: unknown optimizer{guess}; allowed: {', '.join(known)}")
    yield from attention_problem(settings.attn_implementation)


def attention_problem(name: str) -> Iterator[str]:
    """Yield why attention `name` cannot be used, if its package is missing."""
    module, package = _PACKAGES.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        yield (
            f"attn_implementation = {name!r}: needs the package {package}, which is not installed. "
            "Install it, or set 'auto', which needs no package and is as fast"
        )


def model_problem(setting: str, name: str) -> Iterator[str]:
    """Yield reasons, found in its folder, why the model `name` cannot be loaded. A hub name is not
    looked up.
    """
    path = Path(name).expanduser()
    if not path.exists():
        looks_local = name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
        if looks_local and fetch.cached(name) is None:
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            yield f"{setting} = {name!r}: no such folder{did_you_mean(path.name, beside)}"
        return
    if path.is_file():
        yield f"{setting} = {name!r}: is a file; give the folder of the model"
        return
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            yield (
                f"{setting} = {name!r}: is an adapter, not a model; give its base model, or merge "
                "the two first (`xtuner convert merge`)"
            )
        else:
            yield f"{setting} = {name!r}: is not a model folder: it has no config.json"
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{setting} = {name!r}: config.json cannot be read: {error}"
        return
    if not isinstance(content, dict) or "model_type" not in content:
        yield f"{setting} = {name!r}: config.json names no model_type, so this is not a model"


def optimizer_names() -> list[str]:
    """The names of torch's and bitsandbytes' optimizers, read from their source; empty if that
    fails."""
    found: set[str] = set()
    for package in ("torch", "bitsandbytes"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        try:
            source = Path(spec.origin).parent.joinpath("optim", "__init__.py").read_text("utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            return []
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        found |= {alias.asname or alias.name for node in imports for alias in node.names}
    return sorted(name for name in found if name[:1].isupper() and name not in _NO_OPTIMIZERS)
