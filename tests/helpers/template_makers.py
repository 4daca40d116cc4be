"""Tokenizers of three kinds, and chat templates like those of well-known models."""

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
CORPUS = [
    "Hello, how are you?\n\nI am fine, thank you.\n",
    "ASSISTANT: Hello\n\n### Response:\n\nHello</s>\n<|im_end|>\n<|im_end|>\n\n",
    "你好，请做一下自我介绍。\n我是小明的小助手。",
    "  two spaces  and more   spaces ",
] * 4


def byte_tokenizer(*, chat_template=None, tokens=TOKENS, eos="</s>"):
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*tokens, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _wrapped(core, chat_template, tokens, eos)


def merging_tokenizer(*, chat_template=None, tokens=TOKENS, eos="</s>", trim_offsets=False):
    """Byte-level, with tokens that span spaces, line breaks and punctuation."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return _wrapped(core, chat_template, tokens, eos)


def space_tokenizer(*, chat_template=None, tokens=TOKENS, eos="</s>"):
    """As Llama's: a space is put before every text and before what follows a special token."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*TOKENS, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    core.train_from_iterator([*CORPUS, "▁Hello ▁[INST] ▁"], trainer)
    return _wrapped(core, chat_template, tokens, eos)


def _wrapped(core, chat_template, tokens, eos):
    core.add_special_tokens(list(tokens))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token=eos
    )
    tokenizer.chat_template = chat_template
    return tokenizer


_LOOP = "{% for m in messages %}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"

CHATML = _LOOP + _CHATML + "{% endfor %}" + _OPEN
SMOL = (
    _LOOP
    + "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}"
    + "{% endif %}"
    + _CHATML
    + "{% endfor %}"
    + _OPEN
)
LLAMA3 = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim"
    + " + '<|eot_id|>' }}"
    + "{% endfor %}{% if add_generation_prompt %}"
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    + "{% set rest = messages[1:] %}{% else %}{% set sys, rest = '', messages %}{% endif %}"
    + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    + "{% if loop.first and sys %}{{ '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    + "{{ m.content | trim + ' [/INST]' }}{% else %}"
    + "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    + "{% endif %}"
    + _LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    + "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'"
    + " + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    _LOOP
    + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MARKED = (
    _LOOP
    + "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' + m.content"
    + " + '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
    + _CHATML
    + "{% endif %}{% endfor %}"
    + _OPEN
)
MARKED_CONTENT = (
    _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    + "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
    + "{% endfor %}"
    + _OPEN
)
REWRITES = (
    _LOOP
    + "{% if m.role == 'assistant' and loop.last %}"
    + "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}"
    + "{% else %}"
    + _CHATML
    + "{% endif %}{% endfor %}"
    + _OPEN
)
THINKS = _LOOP + _CHATML + "{% endfor %}" + _OPEN.replace("assistant\\n", "assistant\\n<think>\\n")
THINKS_MARKED = MARKED.replace(_OPEN, THINKS[-len(_OPEN) - len("<think>\\n") :])
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    + "{{ '<|im_end|>\\n' }}{% endif %}"
    + _LOOP
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
    + "{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    + "{% endfor %}"
    + _OPEN
)

EXACT = {
    "chatml": (CHATML, "<|im_end|>"),
    "smol": (SMOL, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama2": (LLAMA2, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi3": (PHI3, "<|end|>"),
    "marked": (MARKED, "<|im_end|>"),
    "marked_content": (MARKED_CONTENT, "<|im_end|>"),
}
