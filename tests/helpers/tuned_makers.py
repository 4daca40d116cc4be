"""Tiny models with adapters that answer differently, without a training run."""

import torch

from xtuner.models.adapters import add_adapter
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.testing.tiny import tiny_tokenizer


def write_adapter(work_dir, base, *, seed=0, step=7, **info):
    """A work dir with one checkpoint: an adapter on the model in `base` with random weights."""
    checkpoint = work_dir / f"iter_{step}"
    adapted = add_adapter(load_model(base, dtype=torch.float32), r=4, alpha=64, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    save_model(adapted, checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    RunInfo("adapter", str(base), prompt_template="chatml", step=step, **info).write(checkpoint)
    (work_dir / "last_checkpoint").write_text(f"iter_{step}\n")
    return work_dir
