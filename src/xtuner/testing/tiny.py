"""Tiny models and tokenizers: real architectures, random weights, no download.

For xtuner's tests and yours: a training run on `tiny_model_folder` takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(*, chat_template: str | None = CHATML_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 261 tokens: every byte, and the special tokens of ChatML.

    Decoding inverts encoding for every text. ``eos_token`` is ``<|im_end|>``; ``bos_token`` is
    ``<s>`` and is not added automatically.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal language model of `model_type` with two layers of width 32 and random float32
    weights.

    Args:
        model_type: A model type that transformers knows ('llama', 'qwen3', 'gemma2', 'mistral',
            ...).
        seed: Seed of the weights; the caller's random state does not change.
        overrides: Fields of the model configuration.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    kind = type(AutoConfig.for_model(model_type))
    fixed = {n for n in sizes if isinstance(getattr(kind, n, None), property)}  # Falcon's head_dim
    given = {name: value for name, value in sizes.items() if name not in fixed}
    config = AutoConfig.for_model(model_type, **{**given, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tiny_model_folder(
    folder: Path | str,
    model_type: str = "llama",
    *,
    chat_template: str | None = CHATML_TEMPLATE,
    **options: Any,
) -> Path:
    """Write `tiny_model` and `tiny_tokenizer` into `folder` in Hugging Face format and return
    it."""
    folder = Path(folder)
    tiny_model(model_type, **options).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
