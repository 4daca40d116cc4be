"""The GGUF reader against the `gguf` package, which writes the file and the reference numbers."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from xtuner.errors import ModelError
from xtuner.hub import gguf as ours
from xtuner.testing.tiny import CHATML_TEMPLATE, tiny_tokenizer

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 64
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in GGUF: of each head, row 0, row half, row 1, row half + 1, ..."""
    size = len(weight) // heads
    order = [
        head * size + half * (size // 2) + row
        for head in range(heads)
        for row in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A GGUF file, and a Llama with its quantized weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 2, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4}, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, tokenizer)
    quantised = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        if "embed" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        if "norm" in name:
            kind = gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor.numpy(), kind)
        quantised[name] = torch.tensor(gguf.quants.dequantize(packed, kind)).bfloat16().float()
        if "q_proj" in name or "k_proj" in name:
            packed = interleaved(packed, HEADS if "q_proj" in name else KV_HEADS)
        for new, old in NAMES.items():
            name = name.replace(new, old)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(quantised, strict=False)
    return path, model.eval()


def add_tokenizer(writer, tokenizer) -> None:
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab", "Ġab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    )
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML_TEMPLATE)


def test_model_and_tokenizer_are_those_of_the_file(written, tmp_path: Path) -> None:
    path, reference = written
    ours.convert(path, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[5, 90, 33, 200, 41, 17, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    config = model.config
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)
    assert config.rope_parameters["rope_theta"] == 5e4 and config.max_position_embeddings == 256
    assert not hasattr(config, "quantization_config")
    assert model.generation_config.eos_token_id == 4

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = tiny_tokenizer()
    text = "<|im_start|>user\nGrüße 12!<|im_end|>"
    assert tokenizer.tokenize("ab  ab1") == ["ab", "Ġ", "Ġab", "1"]
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.chat_template == CHATML_TEMPLATE
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (4, 1, 2)


def test_bfloat16_rounds_as_torch_does() -> None:
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10.0**5
    ties = torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -2.5, 0.0])
    values = torch.cat([numbers, ties])
    assert np.array_equal(
        ours.bfloat16_bits(values.numpy()), values.bfloat16().view(torch.uint16).numpy()
    )


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_file_is_named(written, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken.gguf"
    whole = written[0].read_bytes()
    broken.write_bytes(whole[:400] if damage == "cut" else b"no model at all, only words")
    with pytest.raises(ModelError, match=r"broken\.gguf: (the header is truncated|not a GGUF)"):
        ours.convert(broken, tmp_path)


def test_a_file_with_changed_bytes_is_converted_or_named(written, tmp_path: Path) -> None:
    data, random = written[0].read_bytes(), np.random.default_rng(0)
    for number in range(40):
        changed = bytearray(data)
        for place in random.integers(0, min(len(data), 4000), 4):
            changed[place] = random.integers(0, 256)
        (tmp_path / "bad.gguf").write_bytes(
            bytes(changed[: None if number % 2 else len(data) // 2])
        )
        (folder := tmp_path / str(number)).mkdir()
        with contextlib.suppress(ModelError):
            ours.convert(tmp_path / "bad.gguf", folder)
