"""A small InternLM2 as its authors publish it: fused wqkv, sentencepiece, code files.

`forward` is its forward pass, written from the layout alone.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `spread` is the standard deviation of its weights."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    inner: int = 96
    vocabulary: int = 0  # 0: as many as the pieces and special tokens require
    positions: int = 16
    spread: float = 0.15
    dtype: torch.dtype = torch.float32
    files: int = 1

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


TINY = Shape()
PUBLISHED = Shape(16, 8, 128, 24, 8192, 92_544, 32_768, 0.02, torch.bfloat16, 2)
"""The sizes of internlm2-chat-1_8b."""
TEXTS = [
    "请做一下自我介绍", "我是小明的小助手", "Who are you?", "I am a small assistant of Ming.",
    "def add(a, b):\n    return a + b", "0123456789",
    "The quick brown fox jumps over the lazy dog.",
]  # fmt: skip
SPECIAL = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
           "<|im_start|>"]  # fmt: skip
CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_internlm2 import InternLM2Config


class InternLM2ForCausalLM(PreTrainedModel):
    config_class = InternLM2Config

    def __init__(self, config):
        super().__init__(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.output(self.model.tok_embeddings(input_ids)))
"""
CONFIGURATION = """
from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
"""


def write_internlm2(
    folder: Path, *, add_dummy_prefix: bool = True, seed: int = 0, shape: Shape = TINY
) -> Path:
    """Write the model to `folder`."""
    folder.mkdir(parents=True)
    size = _write_tokenizer(folder, shape.vocabulary, add_dummy_prefix=add_dummy_prefix)
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": shape.hidden, "initializer_range": 0.02,
        "intermediate_size": shape.inner, "max_position_embeddings": shape.positions,
        "model_type": "internlm2", "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers, "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 2, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000,
        "tie_word_embeddings": False, "torch_dtype": str(shape.dtype).removeprefix("torch."),
        "transformers_version": "4.37.1", "use_cache": True, "vocab_size": size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": [2, size - 2], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (folder / "modeling_internlm2.py").write_text(CODE, encoding="utf-8")
    (folder / "configuration_internlm2.py").write_text(CONFIGURATION, encoding="utf-8")
    refusal = 'raise SystemExit("remote code was run")\n'
    (folder / "tokenization_internlm2.py").write_text(refusal, encoding="utf-8")
    _write_weights(folder, _weights(size, seed, shape), shape.files)
    return folder


def _write_weights(folder: Path, weights: dict[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    where = {
        name: f"model-{index * files // len(names) + 1:05d}-of-{files:05d}.safetensors"
        for index, name in enumerate(names)
    }
    for file in sorted({*where.values()}):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _weights(size: int, seed: int, shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=shape.dtype) * shape.spread

    hidden, inner = shape.hidden, shape.inner
    found = {
        "model.tok_embeddings.weight": drawn(size, hidden),
        "output.weight": drawn(size, hidden),
        "model.norm.weight": 1 + drawn(hidden),
    }
    fused = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        found |= {
            f"{name}attention.wqkv.weight": drawn(fused, hidden),
            f"{name}attention.wo.weight": drawn(hidden, hidden),
            f"{name}feed_forward.w1.weight": drawn(inner, hidden),
            f"{name}feed_forward.w2.weight": drawn(hidden, inner),
            f"{name}feed_forward.w3.weight": drawn(inner, hidden),
            f"{name}attention_norm.weight": 1 + drawn(hidden),
            f"{name}ffn_norm.weight": 1 + drawn(hidden),
        }
    return found


def _write_tokenizer(folder: Path, vocabulary: int, *, add_dummy_prefix: bool) -> int:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 10), model_writer=buffer, vocab_size=360, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(buffer.getvalue())
    size = vocabulary or -(-(len(proto.pieces) + len(SPECIAL)) // 8) * 8
    for number in range(size - len(proto.pieces)):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = f"[UNUSED_TOKEN_{number}]", -1e6, 1
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = dict(enumerate(["<unk>", "<s>", "</s>"])) | {
        size - len(SPECIAL) + index: token for index, token in enumerate(SPECIAL)
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokens["additional_special_tokens"] = SPECIAL
    values = {
        **tokens,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for index, token in names.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + "
        "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2), encoding="utf-8")
    return size


@torch.no_grad()
def forward(folder: Path, ids: list[int]) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of the weights in `folder`, in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    cos, sin = _rotary(config, len(ids), dim)

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[name] * x * torch.rsqrt(x.pow(2).mean(-1, True) + config["rms_norm_eps"])

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = weights["model.tok_embeddings.weight"][torch.tensor(ids)]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        fused = norm(x, f"{name}attention_norm.weight") @ weights[f"{name}attention.wqkv.weight"].T
        fused = fused.view(len(ids), kv_heads, heads // kv_heads + 2, dim)
        q = turn(fused[:, :, :-2].reshape(len(ids), heads, dim).transpose(0, 1))
        k, v = turn(fused[:, :, -2].transpose(0, 1)), fused[:, :, -1].transpose(0, 1)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        mixed = torch.softmax(q @ k.transpose(1, 2) / dim**0.5 + mask, -1) @ v
        mixed = mixed.transpose(0, 1).reshape(len(ids), -1)
        x = x + mixed @ weights[f"{name}attention.wo.weight"].T
        h = norm(x, f"{name}ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ weights[f"{name}feed_forward.w1.weight"].T)
        up = h @ weights[f"{name}feed_forward.w3.weight"].T
        x = x + (gate * up) @ weights[f"{name}feed_forward.w2.weight"].T
    return norm(x, "model.norm.weight") @ weights["output.weight"].T


def _rotary(config: dict, length: int, dim: int) -> tuple[Tensor, Tensor]:
    base, longest = float(config["rope_theta"]), config["max_position_embeddings"]
    scaling = config.get("rope_scaling")
    if scaling and scaling["type"] == "dynamic" and length > longest:
        factor = scaling["factor"]
        base *= (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
    frequencies = 1 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()
