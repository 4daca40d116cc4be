"""Answers equal those of transformers, stop where they should, and leave the model unchanged."""

import itertools

import pytest
import torch
from scripted_model import ScriptedModel
from torch import nn

from xtuner import templates
from xtuner.errors import ConfigError, ModelError
from xtuner.generation.generate import GenerationOptions, generation_mode, stream
from xtuner.kernels.attention import packed
from xtuner.models import adapters
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.types import Message

TOKENIZER = tiny_tokenizer()
TEMPLATE = templates.load("auto", TOKENIZER)
MESSAGES = (Message("user", "Who are you?"),)
LLAMA = tiny_model("llama")


def answer(model, **options) -> str:
    pieces = stream(
        model,
        TOKENIZER,
        template=TEMPLATE,
        messages=MESSAGES,
        options=GenerationOptions(**{"max_new_tokens": 24, **options}),
    )
    return "".join(pieces)


def reference(model, **options) -> str:
    prompt = torch.tensor([TEMPLATE.prompt_ids(MESSAGES)])
    ids = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=4,
        pad_token_id=2,
        **options,
    )
    text = TOKENIZER.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return text.rstrip("�")


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("deepseek_v3", None),
        ("glm4", {}),
    ],
)
def test_greedy_is_that_of_transformers(model_type: str, overrides: dict | None) -> None:
    if overrides is None:
        overrides = {
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        }  # fmt: skip
    model = tiny_model(model_type, **overrides)
    assert answer(model) == reference(model) != ""


def test_repetition_penalty_is_that_of_transformers() -> None:
    assert answer(LLAMA, repetition_penalty=1.4) == reference(LLAMA, repetition_penalty=1.4)
    assert answer(LLAMA, repetition_penalty=1.4) != answer(LLAMA)


def test_sampling_defaults_of_the_model_are_ignored() -> None:
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=1.7, top_k=3, repetition_penalty=2.0)
    assert answer(model) == answer(LLAMA) == answer(model, temperature=0)


def test_seed_fixes_the_answer_and_leaves_global_state() -> None:
    before = torch.get_rng_state()
    drawn = [answer(LLAMA, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer(LLAMA, temperature=1.0, top_k=1, seed=3) == answer(LLAMA)
    assert answer(LLAMA, temperature=1.0, top_p=1e-6, seed=3) == answer(LLAMA)


def test_stop_words_may_span_tokens_and_are_not_shown() -> None:
    model = ScriptedModel(TOKENIZER("Fine.\nUser: and")["input_ids"])
    assert answer(model, stop_words=("\nUser:",)) == "Fine."
    assert answer(model, max_new_tokens=9, stop_words=("\nUser:",)) == "Fine.\nUse"


@pytest.mark.parametrize("stop", ["template", "model", "option"])
def test_stop_tokens_end_the_answer(stop: str) -> None:
    token = {"template": "<|im_end|>", "model": "<s>", "option": "<unk>"}[stop]
    model = ScriptedModel(TOKENIZER(f"yes{token}no")["input_ids"])
    assert answer(model, max_new_tokens=6) == ("yes" if stop == "template" else "yesno")
    model.generation_config.eos_token_id = [299, TOKENIZER.convert_tokens_to_ids("<s>")]
    assert answer(model, stop_words=("<unk>",), max_new_tokens=6) == "yes"


def test_a_character_is_never_cut() -> None:
    model = ScriptedModel(TOKENIZER("你好")["input_ids"])
    assert [answer(model, max_new_tokens=n) for n in (2, 3, 5, 6)] == ["", "你", "你", "你好"]


def test_the_context_bounds_the_answer() -> None:
    size = len(TEMPLATE.prompt_ids(MESSAGES))
    assert answer(ScriptedModel([70], length=size + 3)) == TOKENIZER.decode([70] * 3)
    with pytest.raises(ModelError, match=f"the context length of the model is {size}"):
        answer(ScriptedModel([70], length=size))


def make_training_model() -> nn.Module:
    base = tiny_model("llama", attention_dropout=0.5)
    base.set_attn_implementation(packed.register())
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = adapters.add_adapter(base, r=4, alpha=8, dropout=0.5)
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    return model


def test_generation_does_not_change_a_model_in_training() -> None:
    model = make_training_model()
    modes = {name: module.training for name, module in model.named_modules()}
    assert answer(model) == answer(LLAMA)  # new adapters change nothing

    unfinished = stream(
        model, TOKENIZER, template=TEMPLATE, messages=MESSAGES, options=GenerationOptions()
    )
    next(unfinished)
    assert torch.is_grad_enabled() and not model.training
    unfinished.close()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.get_base_model().config._attn_implementation == packed.NAME
    assert model.get_base_model().is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())


def test_an_error_surfaces_and_sets_the_model_back() -> None:
    model = ScriptedModel([70], fails_at=2).train()
    with pytest.raises(RuntimeError, match="the model broke"):
        answer(model)
    assert model.training


def test_generation_mode_gives_eager_attention_to_models_without_sdpa() -> None:
    model = tiny_model("gemma2", query_pre_attn_scalar=8)
    model.set_attn_implementation(packed.register())
    with generation_mode(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == packed.NAME


def test_autocast_of_the_caller_holds() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = []
        hook = LLAMA.lm_head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        answer(LLAMA, max_new_tokens=2)
        hook.remove()
    assert set(seen) == {torch.bfloat16}


def test_wrong_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationOptions(max_new_tokens=0, temperature=-1, top_k=0, top_p=1.5)
    assert all(name in str(caught.value) for name in ("max_new_tokens", "temperature", "top_k"))
    assert GenerationOptions(top_p=0.5, seed=1).without_effect == ("top_p", "seed")
    assert GenerationOptions(top_p=0.5, temperature=1).without_effect == ()


def test_pieces_come_while_the_answer_grows() -> None:
    model = ScriptedModel(TOKENIZER("abc")["input_ids"])
    pieces = stream(
        model, TOKENIZER, template=TEMPLATE, messages=MESSAGES, options=GenerationOptions()
    )
    assert list(itertools.islice(pieces, 2)) == ["a", "b"] and model.at == 2
