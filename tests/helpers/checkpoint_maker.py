"""Adapters and checkpoints on tiny models."""

import warnings

import torch
from peft import get_peft_model

from xtuner.models.adapters import add_adapter
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.testing.tiny import tiny_tokenizer


def stir(model):
    """Give every trainable weight an effect; B is zero at first."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += noise.to(parameter.dtype)
    return model


def write_adapter(folder, base, *, config=None, settings=None, **options):
    """An adapter checkpoint as the engine writes it; `config` is a LoraConfig in place of ours."""
    model = load_model(base, dtype=torch.float32)
    if config is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT on tied embeddings
            model = get_peft_model(model, config)
    else:
        model = add_adapter(model, **{"r": 4, "alpha": 8, **options})
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape")  # PEFT on its own lora_bias
        save_model(stir(model), folder)
    tiny_tokenizer().save_pretrained(folder)
    info = RunInfo(
        "adapter", str(base), prompt_template="qwen_chat", system="Be brief.", step=7,
        settings=settings or {},
    )  # fmt: skip
    info.write(folder)
    (folder / "training_state.pt").write_bytes(b"state")
    return folder
