"""Models that cannot pack: detected by their configuration, trained as in transformers."""

import json

import pytest
import torch
from losses import loss_of
from test_causal_lm import LENGTHS, assert_gradients, gradients, plain_loss
from trainer_parts import random_batch

from xtuner.config.schema import Settings
from xtuner.errors import ConfigError
from xtuner.kernels.attention.packed import NAME
from xtuner.kernels.fused import norm_mlp
from xtuner.models.can_pack import resolve_packing, training_implementation, why_apart
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.testing.tiny import tiny_model, tiny_model_folder

GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2}
ALONE = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "falcon": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": {**GPT, "rotary_dim": 4, "n_positions": 256, "n_inner": 64},
    "codegen": {**GPT, "rotary_dim": 4, "n_positions": 256, "n_inner": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "stablelm": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
}
PACKED = ["llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "gpt2", "deepseek_v3", "phi3"]


@pytest.mark.parametrize("architecture", ALONE)
def test_model_with_single_samples_has_the_losses_of_transformers(architecture):
    model = tiny_model(architecture, **ALONE[architecture])
    model.set_attn_implementation(training_implementation(model, "auto"))
    batch = random_batch(*LENGTHS)
    model.eval()  # some have dropout by default
    expected_loss = plain_loss(model, batch)
    expected = gradients(model, expected_loss)
    norm_mlp.install(model)  # as in a run; gated norms are unchanged
    lm = PackedCausalLM(model)
    assert lm.apart
    assert lm.verify() is None
    loss = loss_of(lm, batch)
    assert abs(loss.item() - expected_loss.item()) < 1e-5 * expected_loss.item()
    assert_gradients(model, loss, expected)


@pytest.mark.parametrize("architecture", PACKED)
def test_most_models_are_packed(architecture):
    options = GPT if architecture == "gpt2" else {}
    with torch.device("meta"):
        model = tiny_model(architecture, **options)
    assert why_apart(model) is None
    assert training_implementation(model, "auto") == NAME


def test_a_sample_without_loss_is_left_out_and_a_row_of_them_gives_zero():
    lm = PackedCausalLM(tiny_model("mamba"))
    batch = random_batch(*LENGTHS)
    batch.labels[:, 9:] = -100
    alone = loss_of(lm, batch.split()[0])
    assert torch.equal(loss_of(lm, batch), alone)
    batch.labels[:] = -100
    zero = loss_of(lm, batch)
    assert zero.item() == 0
    assert zero.requires_grad


def settings_for(folder, **options):
    return Settings(pretrained_model_name_or_path=str(folder), data_path="rows.jsonl", **options)


def test_packing_is_decided_by_the_model_and_an_error_where_the_user_wants_it(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path / "mamba")
    tiny_model().save_pretrained(tmp_path / "llama")
    settings, line = resolve_packing(settings_for(tmp_path / "llama"))
    assert settings.pack_to_max_length is True
    assert line is None
    settings, line = resolve_packing(settings_for(tmp_path / "mamba"))
    assert settings.pack_to_max_length is False
    assert "one sample at a time" in line
    assert resolve_packing(settings) == (settings, None)
    with pytest.raises(ConfigError, match="pack_to_max_length = False, or remove it"):
        resolve_packing(settings_for(tmp_path / "mamba", pack_to_max_length=True))


ROWS = [
    {"messages": [{"role": "user", "content": f"{i}"},
                  {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(10)
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mamba", "tuning: lora"),
        ("falcon", "tuning: full\nbatch_size: 3"),
        ("gptj", "tuning: qlora"),
    ],
    ids=["mamba", "falcon", "gptj"],
)
def test_run_notes_that_it_does_not_pack(architecture, options, tmp_path, monkeypatch, capsys):
    from xtuner.cli.app import main

    monkeypatch.chdir(tmp_path)
    sizes = ALONE[architecture]
    if architecture == "gptj":
        sizes = {**sizes, "n_embd": 64}  # complete blocks of 4-bit weights
    tiny_model_folder("model", architecture, **sizes)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "config.yaml").write_text(
        "pretrained_model_name_or_path: model\ndata_path: rows.jsonl\nmax_length: 64\n"
        f"accumulative_counts: 2\nmax_steps: 2\ntensorboard: false\nlora_r: 4\n{options}\n"
        "evaluation_inputs: ['1']\nevaluation_max_new_tokens: 3\nvalidation_ratio: 0.2\n"
    )
    assert main(["train", "config.yaml"]) == 0
    said = capsys.readouterr().out
    assert "one sample at a time" in " ".join(said.split())
    assert "samples" in next(line for line in said.splitlines() if line.startswith("Steps"))
    scalars = (tmp_path / "work_dirs" / "config").glob("*/scalars.jsonl")
    losses = [
        json.loads(line).get("loss") for file in scalars for line in file.read_text().splitlines()
    ]
    assert sum(loss is not None for loss in losses) >= 2
    assert main(["train", "config.yaml", "--overwrite", "--set", "pack_to_max_length=true"]) == 2
    assert "cannot separate samples in one row" in capsys.readouterr().err
