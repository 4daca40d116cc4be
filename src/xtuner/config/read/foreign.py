"""Recognize configs of other trainers by their contents."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

from xtuner.errors import shell_command

XTUNER_OLD = "XTuner 0.x"
LLAMA_FACTORY = "LLaMA-Factory"
TORCHTUNE = "torchtune"
ORIGINS = (XTUNER_OLD, LLAMA_FACTORY, TORCHTUNE)

_FOREIGN_MODULES = ("mmengine", "mmcv", "xtuner")
_OURS = ("tuning", "dataset_format", "steps_are")
"""Settings that XTuner 0.x does not have: a file with one is of this version, with lines of old."""
_LLAMA_FACTORY_KEYS = {"finetuning_type", "stage", "cutoff_len", "dataset_dir", "lora_target"}
_MIN_LLAMA_FACTORY_KEYS = 2


def origin(text: str, suffix: str) -> str | None:
    """The trainer that `text` is a config of; None for a settings file of this version.

    Args:
        text: The content of the file. If it cannot be parsed, the result is None.
        suffix: The suffix of the file name.
    """
    if suffix.lower() == ".py":
        return XTUNER_OLD if _is_old_config(text) else None
    keys = set(re.findall(r"^([A-Za-z_]\w*) *:", text, flags=re.MULTILINE))
    if re.search(r"^ +_component_ *:", text, flags=re.MULTILINE):
        return TORCHTUNE
    return LLAMA_FACTORY if len(keys & _LLAMA_FACTORY_KEYS) >= _MIN_LLAMA_FACTORY_KEYS else None


def offer(path: str, origin: str) -> str:
    """The error message for a config of `origin` that is given as a settings file."""
    return (
        f"{path}: is a config of {origin}, not a settings file of this version.\n"
        f"  `{shell_command('xtuner', 'migrate-cfg', path)}` writes an equivalent settings file, "
        "and lists what it cannot convert;\n"
        f"  `{shell_command('xtuner', 'train', '--migrate', path)}` does that and trains."
    )


def _is_old_config(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        return any(_old_statements(tree)) and not any(map(_is_ours, tree.body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _old_statements(tree: ast.Module) -> Iterator[bool]:
    """Yield, for some statements, whether only an mmengine config has them."""
    for node in tree.body:
        match node:
            case ast.ImportFrom() | ast.Import():
                yield imports_foreign(node)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name("read_base")))]):
                yield True
            case ast.Assign(targets=[ast.Name(name)], value=value):
                yield name == "_base_" or _has_type(value)


def _is_ours(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(name)]):
            return name in _OURS
    return False


def imports_foreign(node: ast.stmt) -> bool:
    """Whether `node` imports what only configs of XTuner 0.x use."""
    match node:
        case ast.ImportFrom(module=str(module)):
            return module.split(".")[0] in _FOREIGN_MODULES
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] in _FOREIGN_MODULES for alias in names)
    return False


def _has_type(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Name("dict"), keywords=keywords):
            return any(keyword.arg == "type" for keyword in keywords)
    return False
