"""The named templates, one row each: the formats of published models.

They are for models without a chat template; models with one use 'auto'.
"""

from __future__ import annotations

from dataclasses import replace

from xtuner.templates.spec import Spec

_CHATML = Spec(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    answer="{content}<|im_end|>",
    stop="<|im_end|>",
    after="\n",
    stop_words=("<|endoftext|>",),
    tokens=("<|im_start|>", "<|im_end|>"),
)
_MISTRAL = Spec(
    start="{bos}",
    system_in_user="[INST] {system}\n\n{content} [/INST]",
    user="[INST] {content} [/INST]",
    assistant="",
    answer=" {content}{eos}",
)
_DEEPSEEK_V2 = Spec(
    start="{bos}",
    system="{content}\n\n",
    user="User: {content}\n\n",
    assistant="Assistant:",
    answer=" {content}{eos}",
)
_DEEPSEEK_V3 = Spec(
    start="{bos}",
    system="{content}",
    user="<｜User｜>{content}",
    assistant="<｜Assistant｜>",
    tokens=("<｜User｜>", "<｜Assistant｜>"),
)

NAMED: dict[str, Spec] = {
    "alpaca": Spec(
        start="{bos}",
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        assistant="### Response:\n",
        after="\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
    ),
    "baichuan_chat": Spec(
        system="{content}",
        user="<reserved_102>{content}",
        assistant="<reserved_103>",
        tokens=("<reserved_102>", "<reserved_103>"),
    ),
    "baichuan2_chat": Spec(
        system="{content}",
        user="<reserved_106>{content}",
        assistant="<reserved_107>",
        tokens=("<reserved_106>", "<reserved_107>"),
    ),
    "chatglm2": Spec(
        start="[gMASK]sop",
        system="{content}\n\n",
        user="[Round {round}]\n\n问：{content}\n\n",
        assistant="答：",
        after="\n\n",
        tokens=("[gMASK]", "sop"),
    ),
    "chatglm3": Spec(
        start="[gMASK]sop",
        system="<|system|>\n {content}",
        user="<|user|>\n {content}",
        assistant="<|assistant|>",
        answer="\n {content}<|user|>",
        stop="<|user|>",
        stop_words=("<|observation|>",),
        stop_opens_next=True,
        tokens=("[gMASK]", "sop", "<|user|>", "<|assistant|>"),
    ),
    "chatml": _CHATML,
    "cohere_chat": Spec(
        start="{bos}",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        answer="{content}<|END_OF_TURN_TOKEN|>",
        stop="<|END_OF_TURN_TOKEN|>",
        tokens=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ),
    "deepseek": _DEEPSEEK_V2,
    "deepseek_coder": Spec(
        start="{bos}",
        system="{content}\n",
        user="### Instruction:\n{content}\n",
        assistant="### Response:",
        answer="\n{content}\n<|EOT|>",
        stop="<|EOT|>",
        after="\n",
        tokens=("<|EOT|>",),
    ),
    "deepseek_r1": _DEEPSEEK_V3,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "default": Spec(
        start="{bos}",
        system="<|System|>:{content}\n",
        user="<|User|>:{content}\n",
        assistant="<|Bot|>:",
        after="\n",
    ),
    "gemma": Spec(
        start="{bos}",
        system_in_user="<start_of_turn>user\n{system}\n\n{content}<end_of_turn>\n",
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        answer="{content}<end_of_turn>",
        stop="<end_of_turn>",
        after="\n",
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "glm4": Spec(
        start="[gMASK]<sop>",
        system="<|system|>\n{content}",
        user="<|user|>\n{content}",
        assistant="<|assistant|>",
        answer="\n{content}<|user|>",
        stop="<|user|>",
        stop_words=("<|observation|>", "<|endoftext|>"),
        stop_opens_next=True,
        tokens=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    ),
    "internlm_chat": Spec(
        start="{bos}",
        system="<|System|>:{content}\n",
        user="<|User|>:{content}<eoh>\n",
        assistant="<|Bot|>:",
        answer="{content}<eoa>",
        stop="<eoa>",
        after="\n",
        tokens=("<eoh>", "<eoa>"),
    ),
    "internlm2_chat": replace(
        _CHATML,
        start="{bos}",
        stop_words=(),
        tool_calls="internlm2",
        further="<|im_start|>{role}\n{content}<|im_end|>\n",
    ),
    "llama2_chat": Spec(
        system_in_user="{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        user="{bos}[INST] {content} [/INST]",
        assistant="",
        answer=" {content} {eos}",
    ),
    "llama3_chat": Spec(
        start="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{content}<|eot_id|>",
        stop="<|eot_id|>",
        stop_words=("<|end_of_text|>",),
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "phi3_chat": Spec(
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        assistant="<|assistant|>\n",
        answer="{content}<|end|>",
        stop="<|end|>",
        after="\n",
        stop_words=("<|endoftext|>",),
        tokens=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "qwen_chat": _CHATML,
    "vicuna": Spec(
        start="{bos}",
        system="{content} ",
        user="USER: {content} ",
        assistant="ASSISTANT:",
        answer=" {content}{eos}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "yi": _CHATML,
    "zephyr": Spec(
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        assistant="<|assistant|>\n",
        after="\n",
    ),
}
