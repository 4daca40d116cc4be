"""The templates of XTuner 0.x, exactly."""

import pytest

from xtuner.templates import load
from xtuner.templates.xtuner0 import XTUNER0
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import Message

TURNS = [
    Message("system", "S"),
    Message("user", "U"),
    Message("assistant", "A"),
    Message("user", "V"),
    Message("assistant", "B"),
]
LAYOUTS = {
    "default": "{bos}<|System|>:S\n<|User|>:U\n<|Bot|>:A{eos}\n{bos}<|User|>:V\n<|Bot|>:B{eos}\n",
    "mistral": "{bos}[INST] S [/INST]\n[INST] U [/INST]A{eos}\n{bos}[INST] V [/INST]B{eos}\n",
    "phi3_chat": (
        "{bos}<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n"
        "<|user|>\nV<|end|>\n<|assistant|>\nB<|end|>\n"
    ),
    "gemma": (
        "{bos}<start_of_turn>system\nS<end_of_turn>\n<start_of_turn>user\nU<end_of_turn>\n"
        "<start_of_turn>model\nA<end_of_turn>{eos}\n"
        "{bos}<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>{eos}\n"
    ),
    "chatglm2": (
        "[gMASK]sopS\n[Round 1]\n\n问：U\n\n答：A{eos}\n\n"
        "[gMASK]sop[Round 2]\n\n问：V\n\n答：B{eos}\n\n"
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    tokenizer = tiny_tokenizer()
    marks = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token}
    expected = LAYOUTS[name]
    for mark, text in marks.items():
        expected = expected.replace(f"{{{mark}}}", text)
    assert load(f"xtuner0_{name}", tokenizer).render(TURNS).text == expected


@pytest.mark.parametrize("name", sorted(XTUNER0))
def test_specs_are_valid(name):
    assert list(XTUNER0[name].problems()) == []
