"""Convert a Llama model from a GGUF file to a Hugging Face folder with numpy.

    header ─► metadata ─► config.json, tokenizer.json, chat_template.jinja
           ─► tensors ─dequantize─► float32 ─round─► bfloat16 ─► model.safetensors

Supports what the fetched model needs: architecture 'llama', byte-level BPE, and the tensor types
F32, Q8_0 and Q4_1. File layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.errors import ModelError, in_one_line
from xtuner.hub.json_files import write_object

Array = np.ndarray[Any, np.dtype[Any]]

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32
"""Values per quantized block."""
_BYTES = {_Q4_1: 20, _Q8_0: 34}
"""Bytes per quantized block."""
_CONTROL = 3
"""Type of control tokens such as ``<|im_start|>``."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass
class _Reader:
    """Reads values from `data` sequentially."""

    data: memoryview
    position: int = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        start = self.position + 8
        (length,) = struct.unpack_from("<Q", self.data, self.position)
        self.position = start + length
        return str(self.data[start : self.position], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        return [self.value(inner) for _ in range(count)]


@dataclass(frozen=True)
class GGUF:
    """An opened GGUF file.

    Attributes:
        metadata: All keys of the header.
        tensors: Name to (shape in numpy order, type, offset in `data`).
        data: The memory-mapped file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    data: Array = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GGUF:
        """Read the header of `path`.

        Raises:
            ModelError: The file is not GGUF, or is truncated.
        """
        data = np.memmap(path, dtype=np.uint8, mode="r")
        reader = _Reader(data.data)
        try:
            if bytes(reader.data[:4]) != b"GGUF" or struct.unpack_from("<I", reader.data, 4)[
                0
            ] not in (2, 3):
                raise ModelError(f"{path}: not a GGUF file of version 2 or 3")
            reader.position = 8
            num_tensors, num_keys = reader.number("Q"), reader.number("Q")
            metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_keys)}
            found = {}
            for _ in range(num_tensors):
                name = reader.text()
                sizes = [reader.number("Q") for _ in range(reader.number("I"))]
                found[name] = (tuple(reversed(sizes)), reader.number("I"), reader.number("Q"))
        except (struct.error, KeyError) as error:
            raise ModelError(f"{path}: the header is truncated or damaged ({error!r})") from error
        alignment = int(metadata.get("general.alignment", 32))
        base = -(-reader.position // alignment) * alignment
        tensors = {n: (shape, kind, base + at) for n, (shape, kind, at) in found.items()}
        return cls(metadata, tensors, data)

    def tensor(self, name: str) -> Array:
        """Return tensor `name` as float32.

        Raises:
            ModelError: Its type is not supported.
        """
        shape, kind, start = self.tensors[name]
        count = math.prod(shape)
        if kind == _F32:
            return self.data[start : start + 4 * count].view(np.float32).reshape(shape)
        if kind not in _BYTES:
            raise ModelError(
                f"tensor {name}: GGUF type {kind} is not supported; supported: F32, Q4_1, Q8_0"
            )
        size = _BYTES[kind]
        blocks = self.data[start : start + count // _BLOCK * size].reshape(-1, size)
        return (_q8_0(blocks) if kind == _Q8_0 else _q4_1(blocks)).reshape(shape)


def _q8_0(blocks: Array) -> Array:
    """A block is a float16 scale and 32 int8 values."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    values: Array = scale * blocks[:, 2:].view(np.int8)
    return values


def _q4_1(blocks: Array) -> Array:
    """A block is a float16 scale, a float16 minimum and 32 nibbles, low nibbles first."""
    scale, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values: Array = scale * nibbles + low
    return values


def bfloat16_bits(values: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; return the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    high: Array = rounded.view("<u2")[..., 1::2].copy()
    return high


def convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of the GGUF file `path` into the existing `folder`.

    Raises:
        ModelError: The file is damaged, or contains something that is not supported.
    """
    try:
        _convert(path, folder)
    except (ModelError, OSError):
        raise
    except Exception as error:  # sizes and names in a damaged file may be anything
        raise ModelError(f"{path}: is not a complete GGUF file: {in_one_line(error)}") from error


def _convert(path: Path, folder: Path) -> None:
    file = GGUF.open(path)
    kinds = file.metadata.get("general.architecture"), file.metadata.get("tokenizer.ggml.model")
    if kinds != ("llama", "gpt2"):
        raise ModelError(
            f"{path}: architecture and tokenizer {kinds} are not supported; "
            "supported: ('llama', 'gpt2')"
        )
    _write_weights(file, folder)
    config = _config(file)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_object(folder / "config.json", config)
    write_object(folder / "generation_config.json", generation)
    _write_tokenizer(file, folder)


def _write_weights(file: GGUF, folder: Path) -> None:
    """Write a safetensors file: length of the header, header, concatenated tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _, _) in file.tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        header[_llama_name(name)] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the file and need aligned data
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in file.tensors:
            out.write(bfloat16_bits(_llama_tensor(file, name)).data)


def _llama_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in _NAMES:
        raise ModelError(f"tensor {name}: is not a known tensor of a Llama model")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.weight"


def _llama_tensor(file: GGUF, name: str) -> Array:
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
    values = file.tensor(name)
    return _unpermute(values, file.metadata[f"llama.attention.{heads}"]) if heads else values


def _unpermute(weight: Array, heads: int) -> Array:
    """Undo the interleaving of the two rotary halves; Hugging Face stores them separately."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _config(file: GGUF) -> dict[str, Any]:
    values = file.metadata
    heads, width = values["llama.attention.head_count"], values["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": values["llama.context_length"],
        # The header stores float32, which reads 1e-5 as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": values["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _write_tokenizer(file: GGUF, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    values = file.metadata
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)]
    single_digits = values.get("tokenizer.ggml.pre") == "smollm"
    core.pre_tokenizer = pre_tokenizers.Sequence([*(digits if single_digits else ()), by_byte])
    core.decoder = decoders.ByteLevel()
    kinds = zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
    core.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == _CONTROL]
    )
    core.save(str(folder / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    write_object(
        folder / "tokenizer_config.json",
        {
            **{
                f"{k}_token": tokens[values[f"tokenizer.ggml.{v}_token_id"]]
                for k, v in special.items()
            },
            "clean_up_tokenization_spaces": False,
            "model_max_length": values["llama.context_length"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    if template := values.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
