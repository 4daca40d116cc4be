"""Fixes tokenizers that transformers builds from only a sentencepiece file (``tokenizer.model``).

For a class of remote code (InternLM2Tokenizer) transformers 5.23 reads the vocabulary and leaves
out the normalizer's options, so with ``add_dummy_prefix`` a text gets other ids than in
sentencepiece. BOS, which such classes add by default, is missing as well.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

_SPACE = "▁"


def correct(tokenizer: Any, folder: str) -> None:
    """Give `tokenizer` the normalizer and BOS of the sentencepiece file in `folder`. Tokenizers
    with a class in transformers or a tokenizer.json are correct and stay unchanged.
    """
    base = Path(folder)
    file = base / "tokenizer.model"
    if (
        not file.is_file()
        or (base / "tokenizer.json").is_file()
        or type(tokenizer).__name__ != "TokenizersBackend"
    ):
        return
    options = _normalizer_options(file)
    if options is None:
        return
    _set_normalizer(tokenizer.backend_tokenizer, options)
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer.add_bos_token = bool(config.get("add_bos_token", True))
    tokenizer.add_eos_token = bool(config.get("add_eos_token", False))


def _normalizer_options(file: Path) -> Any:
    """The normalizer_spec of a sentencepiece file; None for other files."""
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    errors: Any = importlib.import_module("google.protobuf.message")
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except errors.DecodeError:
        return None
    return proto.normalizer_spec


def _set_normalizer(core: Any, options: Any) -> None:
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    if options.precompiled_charsmap:
        steps.append(normalizers.Precompiled(options.precompiled_charsmap))
    if options.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if options.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    core.normalizer = normalizers.Sequence(steps)
    if options.add_dummy_prefix:
        core.decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
