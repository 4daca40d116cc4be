"""The templates of XTuner 0.1 and 0.2 that differ from those of the same name in this version.

They are for runs that continue from such a version (`xtuner migrate-cfg` writes their names); new
runs should use 'auto'. These versions put BOS before each turn that follows an EOS, and the system
message before the first question. Templates that are the same in all versions (internlm2_chat,
llama3_chat, ...) are not repeated here.
"""

from __future__ import annotations

from dataclasses import replace

from xtuner.templates.spec import Spec


def _turns(question: str, reply: str, *, system: str = "{system}\n", after: str = "\n") -> Spec:
    """A template in which each user turn begins with BOS and each answer ends with EOS."""
    return Spec(
        system_in_user="{bos}" + system + question,
        user="{bos}" + question,
        assistant=reply,
        answer="{content}{eos}",
        after=after,
    )


def _ended(spec: Spec, stop: str, *, more: tuple[str, ...] = ()) -> Spec:
    """`spec` with its own stop instead of EOS, and BOS only once."""
    return replace(
        spec,
        start="{bos}",
        system_in_user=spec.system_in_user.removeprefix("{bos}"),
        user=spec.user.removeprefix("{bos}"),
        answer="{content}" + stop,
        stop=stop,
        stop_words=more,
    )


_INST = "[INST] {content} [/INST]"
_CHATML = _ended(
    _turns(
        "<|im_start|>user\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "<|im_end|>",
    more=("<|endoftext|>",),
)
_GLM = "[gMASK]sop"

XTUNER0: dict[str, Spec] = {
    "xtuner0_baichuan2_chat": _turns("<reserved_106>{content}", "<reserved_107>"),
    "xtuner0_baichuan_chat": _turns("<reserved_102>{content}", "<reserved_103>"),
    "xtuner0_chatglm2": Spec(
        system_in_user=_GLM + "{system}\n[Round 1]\n\n问：{content}\n\n",
        user=_GLM + "[Round {round}]\n\n问：{content}\n\n",
        assistant="答：",
        after="\n\n",
    ),
    "xtuner0_chatglm3": Spec(
        system_in_user=_GLM + "<|system|>\n{system}<|user|>\n{content}",
        user=_GLM + "<|user|>\n{content}",
        assistant="<|assistant|>\n",
        after="\n",
    ),
    "xtuner0_code_llama_chat": _turns(_INST, "", after=""),
    "xtuner0_deepseek_coder": _turns(
        "### Instruction:\n{content}\n",
        "### Response:\n",
        system=(
            "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by "
            "DeepSeekCompany, and you only answer questions related to computer science. For "
            "politically sensitive questions, security and privacy issues, and other non-computer "
            "science questions, you will refuse to answer. {system}\n"
        ),
    ),
    "xtuner0_deepseek_v2": _ended(
        _turns("User: {content}\n\n", "Assistant: ", system="{system}\n\n", after=""),
        "<｜end▁of▁sentence｜>",
    ),
    "xtuner0_default": _turns("<|User|>:{content}\n", "<|Bot|>:", system="<|System|>:{system}\n"),
    "xtuner0_gemma": replace(
        _turns(
            "<start_of_turn>user\n{content}<end_of_turn>\n",
            "<start_of_turn>model\n",
            system="<start_of_turn>system\n{system}<end_of_turn>\n",
        ),
        answer="{content}<end_of_turn>{eos}",
        stop="<end_of_turn>",
    ),
    "xtuner0_llama2_chat": _turns(
        _INST,
        "",
        system=(
            "[INST] <<SYS>>\n You are a helpful, respectful and honest assistant. Always answer as "
            "helpfully as possible, while being safe. Your answers should not include any harmful, "
            "unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that "
            "your responses are socially unbiased and positive in nature.\n{system}\n<</SYS>>\n "
            "[/INST] "
        ),
    ),
    "xtuner0_minicpm": _turns("<用户> {content}", " <AI>"),
    "xtuner0_mistral": _turns(_INST, "", system="[INST] {system} [/INST]\n"),
    "xtuner0_phi3_chat": _ended(
        _turns(
            "<|user|>\n{content}<|end|>\n",
            "<|assistant|>\n",
            system="<|system|>\n{system}<|end|>\n",
        ),
        "<|end|>",
    ),
    "xtuner0_qwen_chat": _CHATML,
    "xtuner0_vicuna": _turns(
        "USER: {content} ",
        "ASSISTANT:",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. {system}\n "
        ),
    ),
    "xtuner0_wizardcoder": _turns(
        "### Instruction:\n{content}\n\n",
        "### Response:",
        system=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n{system}\n "
        ),
        after="\n\n",
    ),
    "xtuner0_zephyr": _turns(
        "<|user|>\n{content}\n", "<|assistant|>\n", system="<|system|>\n{system}\n"
    ),
}
