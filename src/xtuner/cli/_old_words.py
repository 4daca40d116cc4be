"""Translates command lines of XTuner 0.x.

    chat M --torch-dtype fp16   ──►   chat M --dtype float16
    train C --seed 3            ──►   train C --set seed=3

What has no counterpart is named on stderr and left out if the command does the same without it;
otherwise it is an error that names what replaces it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from xtuner.errors import ConfigError

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "auto": "auto"}
_LISTS = {"chat": ("--stop-words", "--with-plugins")}
"""Options that take several values at once."""
_RENAMED = {
    "chat": {"--command-stop-word": "--stop-words", "--answer-stop-word": "--stop-words"},
}
_NO_NAME = "the name of the assistant is part of the template or system message"
_NO_OFFLOAD = "weights are not offloaded to disk; --bits 4 takes less memory"
_ONE_PROCESS = "this command runs in one process"
_LEFT_OUT = {
    "chat": {"--bot-name": _NO_NAME, "--offload-folder": _NO_OFFLOAD},
    "mmbench": {
        "--bot-name": _NO_NAME, "--offload-folder": _NO_OFFLOAD, "--launcher": _ONE_PROCESS,
        "--torch-dtype": "the hardware determines the number type",
        "--seed": "answers are greedy",
        "--stop-words": "the template determines where answers end",
    },
    "test": {"--launcher": _ONE_PROCESS},
    "train": {"--local_rank": "processes determine their rank themselves",
              "--local-rank": "processes determine their rank themselves"},
    "convert": {"--safe-serialization": "files are always safetensors"},
}  # fmt: skip
_FLAGS = ("--safe-serialization",)
"""Options without a value."""
_REMOVED = {
    "dist_train": "use `xtuner train CONFIG --nproc GPUS`",
    "dist_test": "use `xtuner test CONFIG --checkpoint DIR`",
    "preprocess": "is not in this version. arXiv metadata: write rows with 'title' and 'abstract' "
    "and use dataset_format = 'arxiv'; RefCOCO: write LLaVA conversations yourself",
    "eval_refcoco": "is not in this version; `xtuner mmbench` measures multiple-choice questions, "
    "`xtuner test` asks the questions of a settings file",
}


def translated(arguments: Sequence[str]) -> list[str]:
    """`arguments` in the syntax of this version.

    Raises:
        ConfigError: A command that no longer exists.
    """
    given = _commands(list(arguments))
    command = given[0] if given else ""
    if command in _REMOVED:
        raise ConfigError(f"xtuner {command}: {_REMOVED[command]}")
    return [*given[:1], *_options(command, given[1:])]


def _commands(given: list[str]) -> list[str]:
    match given:
        case ["help", *rest]:
            return [*rest, "--help"]
        case ["version" | "-v"]:
            return ["--version"]
        case ["list_cfg" | "copy_cfg" | "log_dataset" | "check_custom_dataset" as name, *rest]:
            return [name.replace("_", "-"), *rest]
    return given


def _options(command: str, given: list[str]) -> Iterator[str]:
    renamed = _RENAMED.get(command, {})
    position, seen_argument = 0, False
    while position < len(given):
        word, equals, attached = given[position].partition("=")
        word = renamed.get(word, word)
        position += 1
        values = [attached] if equals else given[position : position + 1]
        step = 0 if equals else 1
        if reason := _LEFT_OUT.get(command, {}).get(word):
            print(f"Note: {word} is ignored: {reason}.", file=sys.stderr)
            position += 0 if word in _FLAGS else step
        elif change := _VALUES.get((command, word)):
            yield from change("".join(values))
            position += step
        elif word in _LISTS.get(command, ()) and not equals and seen_argument:
            while position < len(given) and not given[position].startswith("-"):
                yield from (word, given[position])
                position += 1
        else:
            seen_argument = seen_argument or not word.startswith("-")
            yield f"{word}{equals}{attached}"


def _dtype(value: str) -> list[str]:
    return ["--dtype", _DTYPES.get(value, value)]


def _seed(value: str) -> list[str]:
    return ["--set", f"seed={value}"]


def _save_format(value: str) -> list[str]:
    if value == "official":
        raise ConfigError(
            "--save-format official: the layout of LLaVA 1.5's own repository is not written any "
            "more; use --save-format huggingface, one model that plain transformers loads"
        )
    return ["--save-format", value]


def _layer(value: str) -> list[str]:
    if value != "-2":
        raise ConfigError(
            f"--visual-select-layer {value}: the model uses the layer it was trained with; to use "
            "another, set visual_select_layer and train again"
        )
    return []


def _system(value: str) -> list[str]:
    from xtuner.migrate.xtuner.names import names

    texts = names("systems")
    if value not in texts:
        raise ConfigError(f"--system-template {value}: must be one of {', '.join(texts)}")
    print(
        f"Note: the system message {value!r} has xtuner's own wording; --system TEXT sets yours.",
        file=sys.stderr,
    )
    return ["--system", str(texts[value]).strip()]


_VALUES: dict[tuple[str, str], Callable[[str], list[str]]] = {
    ("chat", "--torch-dtype"): _dtype,
    ("chat", "--system-template"): _system,
    ("chat", "--visual-select-layer"): _layer,
    ("mmbench", "--visual-select-layer"): _layer,
    ("train", "--seed"): _seed,
    ("convert", "--save-format"): _save_format,
}
"""Options whose values are translated as well."""
