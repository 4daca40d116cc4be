"""An adapter trained on 4-bit weights is merged into those weights, dequantised."""

import pytest
import torch

from xtuner.convert.merge import merge
from xtuner.models.adapters import add_adapter, load_adapter
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.testing.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(5, 60)[None]


@pytest.mark.parametrize(
    ("kind", "given", "width"),
    [
        ("nf4", "adapter", 128),
        ("fp4", "adapter", 128),
        ("nf4", "adapter", 112),  # row lengths that are not multiples of 64
        ("nf4", "parts/llm_adapter", 128),
        ("nf4", "parts", 128),
    ],
)
def test_merged_equals_quantised_base_and_adapter(tmp_path, kind, given, width):
    """Also as part of a LLaVA model, whose run.yaml is one level up."""
    sizes = {"hidden_size": 64, "intermediate_size": width, "head_dim": 16}
    base = tmp_path / "base"
    tiny_model(**sizes, initializer_range=0.2).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapted = add_adapter(load_model(base, dtype=torch.float32), r=4, alpha=8)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    run = tmp_path / given.split("/")[0]
    adapter = run / "llm_adapter" if given.startswith("parts") else run
    save_model(adapted, adapter)
    if adapter != run:
        (run / "projector").mkdir()
    settings = {"tuning": "qlora", "quantization": kind, "dtype": "float32", "double_quant": True}
    RunInfo(kind="adapter", base_model=str(base), settings=settings).write(run)
    out = tmp_path / "merged"
    report = merge(base, tmp_path / given, out, dtype="float32", log=lambda line: None)
    assert report.how == "shard by shard" and report.relative < 1e-4

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=IDS, use_cache=False).logits

    held = load_model(base, dtype=torch.float32, quantization=kind)
    wanted = logits(load_adapter(held, adapter))
    merged = logits(load_model(tmp_path / "merged", dtype=torch.float32))
    unrounded = logits(load_adapter(load_model(base, dtype=torch.float32), adapter))
    scale = wanted.abs().max()
    assert (merged - wanted).abs().max() < 1e-3 * scale
    assert (unrounded - wanted).abs().max() > 1e-2 * scale  # the error of the previous method
