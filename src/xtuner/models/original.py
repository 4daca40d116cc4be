"""Keeps the original files of a model: what is unchanged stays byte-identical.

    base folder ──config.json, tokenizer, code files──► written model ◄── weights

transformers rewrites config.json and the tokenizer files when it saves. Other programs (LMDeploy,
vLLM, llama.cpp's converter, remote code) read the files as their authors published them.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError
from xtuner.hub import fetch
from xtuner.hub.json_files import read_object, write_object
from xtuner.hub.links import refuse_links_out
from xtuner.models.load import quiet_transformers, register_family

TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template.*", "additional_chat_templates/*", "spiece.model", "*.tiktoken",
    "sentencepiece.bpe.model", "tokenization_*.py",
)  # fmt: skip
_NUMBER_TYPE = ("torch_dtype", "dtype")


def folder_of(name: str) -> Path | None:
    """The folder of a model on this machine: given, fetched, or in the hub cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if fetched := fetch.cached(name):
        return fetched
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name on the hub
        return None
    return Path(file).parent if isinstance(file, str) else None


def keep_config(base: Path, folder: Path) -> None:
    """Restore the base model's keys and values in ``folder/config.json``, which transformers wrote.
    Only differences from the base model, such as the dtype, are kept. Code files that the
    configuration names are copied.
    """
    source = base / "config.json"
    if not source.is_file() or not _may_copy(base):
        return
    original = read_object(source)
    written = read_object(folder / "config.json")
    if original.get("model_type") != written.get("model_type"):
        return
    plain = _as_written_by_transformers(base, original)
    config = {
        name: value for name, value in original.items() if name in written or name not in plain
    }
    changed = {n: v for n, v in written.items() if n not in plain or plain[n] != v}
    changed.pop("transformers_version", None)
    for name in _NUMBER_TYPE:
        changed.pop(name, None)
    config = with_dtype({**config, **changed}, str(written.get("dtype") or "float32"))
    write_object(folder / "config.json", config)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    copy_code(base, folder, config)


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with the given dtype, under the key that it uses."""
    name = next((name for name in _NUMBER_TYPE if name in config), "dtype")
    return {**config, name: dtype}


def copy_code(base: Path, folder: Path, config: dict[str, Any]) -> None:
    """Copy the Python files of `base` if `config` names some in its ``auto_map``.

    They are copied, never executed.
    """
    classes = (config.get("auto_map") or {}).values()
    names = [name for value in classes for name in (value if isinstance(value, list) else [value])]
    if any(name and "--" not in name for name in names):
        copy_files(base, folder, ("*.py",))


def keep_tokenizer(tokenizer: Any, base: Path | None, folder: Path) -> None:
    """Write `tokenizer` to `folder`, as the files of `base` if it has no additional tokens."""
    added = set(tokenizer.get_added_vocab())
    if base is None or not _may_copy(base) or not added <= _tokens_of(base):
        with quiet_transformers():
            tokenizer.save_pretrained(str(folder))
        return
    copy_files(base, folder, TOKENIZER_FILES)


def has_tokenizer_of(folder: Path, base: Path) -> bool:
    """Whether the tokenizer in `folder` adds nothing to the one in `base`."""
    return _tokens_of(folder) <= _tokens_of(base) and _chat_template(folder) == _chat_template(base)


def _may_copy(base: Path) -> bool:
    """Whether no symbolic link in `base` points outside it."""
    try:
        refuse_links_out(base)
    except ModelError:
        return False
    return True


def _as_written_by_transformers(base: Path, original: dict[str, Any]) -> dict[str, Any]:
    """The configuration of `base`, as transformers would save it; `original` for a model that needs
    code of its own, which does not run here."""
    from transformers import AutoConfig

    register_family(str(base))
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        except ValueError:
            return original
        return dict(json.loads(config.to_json_string()))


def _tokens_of(folder: Path) -> set[str]:
    """The added and special tokens that the tokenizer files of `folder` declare."""
    config = read_object(folder / "tokenizer_config.json")
    found = {str(token.get("content")) for token in config.get("added_tokens_decoder", {}).values()}
    found |= set(read_object(folder / "added_tokens.json"))
    found |= {
        str(t["content"]) for t in read_object(folder / "tokenizer.json").get("added_tokens", [])
    }
    for values in (config, read_object(folder / "special_tokens_map.json")):
        for name, value in values.items():
            if name.endswith(("_token", "_special_tokens")):
                for token in value if isinstance(value, list) else [value]:
                    found.add(str(token.get("content") if isinstance(token, dict) else token))
    return found


def _chat_template(folder: Path) -> Any:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return read_object(folder / "tokenizer_config.json").get("chat_template")


def copy_files(base: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `base` whose names match one of `patterns` to `folder`."""
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        if path.is_file() and any(fnmatch.fnmatch(str(inner), pattern) for pattern in patterns):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inner)
