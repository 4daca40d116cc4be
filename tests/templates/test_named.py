"""The named templates: the published layouts, exactly, and the user's own."""

import subprocess
import sys

import pytest
from template_makers import CHATML, EXACT, byte_tokenizer

from xtuner.errors import ConfigError, DataError, ModelError
from xtuner.templates import load, names
from xtuner.templates.table import NAMED
from xtuner.types import Conversation, Message

SYSTEM, ASK, TELL = Message("system", "S"), Message("user", "U"), Message("assistant", "A")
TWO_TURNS = (SYSTEM, ASK, TELL, Message("user", "V"), Message("assistant", "B"))

LAYOUTS = {
    "default": "<s><|System|>:S\n<|User|>:U\n<|Bot|>:A</s>\n<|User|>:V\n<|Bot|>:B</s>\n",
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
    ),
    "internlm_chat": (
        "<s><|System|>:S\n<|User|>:U<eoh>\n<|Bot|>:A<eoa>\n<|User|>:V<eoh>\n<|Bot|>:B<eoa>\n"
    ),
    "internlm2_chat": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
    ),
    "llama2_chat": ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST] B </s>"),
    "llama3_chat": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
    ),
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST] B</s>",
    "gemma": (
        "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"
    ),
    "phi3_chat": (
        "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n"
        "<|user|>\nV<|end|>\n<|assistant|>\nB<|end|>\n"
    ),
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n"
        "<|user|>\nV</s>\n<|assistant|>\nB</s>\n"
    ),
    "vicuna": "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT: B</s>",
    "deepseek_v2": "<s>S\n\nUser: U\n\nAssistant: A</s>User: V\n\nAssistant: B</s>",
    "deepseek_v3": "<s>S<｜User｜>U<｜Assistant｜>A</s><｜User｜>V<｜Assistant｜>B</s>",
    "deepseek_coder": (
        "<s>S\n### Instruction:\nU\n### Response:\nA\n<|EOT|>\n"
        "### Instruction:\nV\n### Response:\nB\n<|EOT|>\n"
    ),
    "baichuan_chat": "S<reserved_102>U<reserved_103>A</s><reserved_102>V<reserved_103>B</s>",
    "baichuan2_chat": "S<reserved_106>U<reserved_107>A</s><reserved_106>V<reserved_107>B</s>",
    "chatglm2": (
        "[gMASK]sopS\n\n[Round 1]\n\n问：U\n\n答：A</s>\n\n[Round 2]\n\n问：V\n\n答：B</s>\n\n"
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\n S<|user|>\n U<|assistant|>\n A<|user|>\n V<|assistant|>\n B<|user|>"
    ),
    "glm4": (
        "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\nA<|user|>\nV<|assistant|>\nB<|user|>"
    ),
    "alpaca": (
        "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n"
        "### Instruction:\nV\n\n### Response:\nB</s>\n\n"
    ),
    "cohere_chat": (
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>U<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>V<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>B<|END_OF_TURN_TOKEN|>"
    ),
}
ALIASES = {
    "qwen_chat": "chatml",
    "yi": "chatml",
    "mixtral": "mistral",
    "deepseek": "deepseek_v2",
    "deepseek_r1": "deepseek_v3",
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_layout(name):
    text = load(name, byte_tokenizer()).render(TWO_TURNS).text
    assert text == LAYOUTS[ALIASES.get(name, name)]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_spec_is_valid(name):
    assert list(NAMED[name].problems()) == []


@pytest.mark.parametrize(
    ("auto", "named"),
    [
        ("chatml", "chatml"),
        ("llama2", "llama2_chat"),
        ("llama3", "llama3_chat"),
        ("gemma", "gemma"),
    ],
)
def test_named_gives_the_ids_and_mask_of_the_models_own(auto, named):
    own = load("auto", byte_tokenizer(chat_template=EXACT[auto][0]))
    other = load(named, byte_tokenizer())
    for messages in (TWO_TURNS, TWO_TURNS[1:]):
        conversation = Conversation(messages)
        assert own.encode(conversation) == other.encode(conversation)
        assert own.prompt_ids(messages[:-1]) == other.prompt_ids(messages[:-1])


def test_internlm2_stops_at_end_token_and_end_of_turn():
    tokenizer = byte_tokenizer()
    template = load("internlm2_chat", tokenizer)
    assert template.stop_token_ids == tuple(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert template.stop_words == ("<|im_end|>",)


def test_tokens_that_the_model_lacks_are_named(caplog):
    template = load("chatml", byte_tokenizer(tokens=("<unk>", "<s>", "</s>")))
    assert "<|im_start|>, <|im_end|> are not tokens of this model" in caplog.text
    assert template.stop_words[0] == "<|im_end|>"
    assert len(template.stop_token_ids) == 1


def test_second_system_message_of_a_model_without_system_turns():
    with pytest.raises(DataError, match="only at the start"):
        load("gemma", byte_tokenizer()).render((SYSTEM, ASK, TELL, SYSTEM))


def test_tokenizer_without_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="this tokenizer has none"):
        load("vicuna", tokenizer)
    assert load("chatml", tokenizer).stop_words[0] == "<|im_end|>"


def test_unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'vicuna'"):
        load("vicunna", byte_tokenizer())


def test_own_spec(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from xtuner.templates.spec import Spec\n"
        "GOOD = Spec(system='{content}\\n', user='Q: {content}\\n', assistant='A:',\n"
        "            answer=' {content}{eos}')\n"
        "BAD = Spec(user='Q', assistant='A: {content}', answer='{content}')\n"
        "WRONG = 'Q: {}'\n"
    )
    template = load("mine.py:GOOD", byte_tokenizer(), folder=tmp_path)
    assert template.render((ASK, TELL)).text == "Q: U\nA: A</s>"
    with pytest.raises(ConfigError) as caught:
        load("mine.py:BAD", byte_tokenizer(), folder=tmp_path)
    for part in (
        "4 problems",
        "assistant: cannot contain {content}",
        "user: must contain",
        "the stop",
        "exactly one of the two",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="it must be a Spec"):
        load("mine.py:WRONG", byte_tokenizer(), folder=tmp_path)


def test_fingerprints_differ_where_the_layout_does():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    prints = {load(name, tokenizer).fingerprint() for name in names()}
    assert len(prints) == len(names()) - len(ALIASES)
    assert load("chatml", tokenizer, system="x").fingerprint() not in prints


def test_names_import_neither_torch_nor_transformers():
    code = (
        "import sys; from xtuner.templates import names; assert names()[0] == 'auto'; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
