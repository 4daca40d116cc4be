"""Models that would load but compute wrong results are rejected."""

import json

import pytest
import torch
from torch import nn

from xtuner.errors import ModelError
from xtuner.models.load import load_model, load_tokenizer
from xtuner.models.unsupported import check_remote_code
from xtuner.testing.tiny import tiny_model


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "internlmxcomposer2"}, "PLoRA"),
        ({"model_type": "internvl_chat"}, "InternVL is not supported"),
        ({"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"]}, "reward model"),
    ],
    ids=["xcomposer", "internvl", "reward model"],
)
def test_refused_by_name(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(ModelError, match=words):  # before any code of its tokenizer runs
        load_tokenizer(tmp_path, trust_remote_code=True)


def of_remote_code(model):
    """`model` with a class like those that transformers creates from code next to the weights."""
    model.__class__ = type(
        "Remote", (type(model),), {"__module__": "transformers_modules.x.modeling"}
    )
    return model


def test_buffers_that_were_not_filled_are_found():
    model = of_remote_code(tiny_model())
    check_remote_code("model", model)
    frequencies = model.model.rotary_emb.inv_freq
    right = frequencies.clone()
    for wrong in (torch.zeros_like(right), torch.full_like(right, float("nan")), right.flip(0)):
        frequencies.copy_(wrong)
        with pytest.raises(ModelError, match=r"inv_freq.*transformers 5"):
            check_remote_code("model", model)
    frequencies.copy_(right)
    model.model.norm.weight = nn.Parameter(torch.full_like(model.model.norm.weight, float("nan")))
    with pytest.raises(ModelError, match="logits are not finite"):
        check_remote_code("model", model)


def test_transformers_own_code_is_not_tried():
    model = tiny_model()
    model.model.rotary_emb.inv_freq.zero_()
    check_remote_code("model", model)
