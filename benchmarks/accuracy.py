"""Compare the loss of every step with a float32 reference that shares no kernel with xtuner.

    python benchmarks/accuracy.py [--data ROWS.json] [--model DIR] [--steps 100] [--max-length 256]

xtuner runs `xtuner train` with its own dtypes. The reference is plain transformers and peft in
float32, one sample at a time, with full logits. Both use the same samples in the same steps and
start with the same adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from cpu import COMMON, HOME, run_xtuner
from rows import rows
from torch.nn import functional as F


def reference(options: argparse.Namespace, length: int, tuning: str) -> list[float]:
    """Loss per supervised token of each step, in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from xtuner.algorithms.sft import Algorithm
    from xtuner.config.load import load_settings
    from xtuner.data.loader import Loader
    from xtuner.training.data_parts import DataParts

    of_run = {"pretrained_model_name_or_path": str(options.model), "data_path": str(options.data)}
    loaded = load_settings({**COMMON, "max_length": length, "tuning": "lora", **of_run})
    settings = loaded.settings
    data = DataParts.open(loaded).build(quiet=True)
    loader = Loader(
        data.train,
        collate=Algorithm().collate,
        batch_size=1,
        accumulative_counts=1,
        seed=settings.seed,
        shuffle=settings.shuffle,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="eager"
    )
    if tuning == "lora":
        torch.manual_seed(settings.seed)
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, weight_decay=0.0)
    losses = []
    for group in loader.groups(0, options.steps):
        samples = [sample for batch in group for sample in batch.split()]
        count = sum(int((sample.labels[0, 1:] >= 0).sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            logits = model(input_ids=sample.input_ids).logits[0, :-1]
            loss = F.cross_entropy(logits, sample.labels[0, 1:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base_dir = Path(folder)
        if options.data is None:
            options.data = base_dir / "rows.json"
            options.data.write_text(json.dumps(rows(999)))
        options.data, options.model = options.data.resolve(), options.model.resolve()
        changes = {"tuning": options.tuning, "max_length": options.max_length}
        if options.tuning == "full":
            changes["weight_decay"] = 0.0
        scalars, _ = run_xtuner(changes, base_dir, options)
        ours = [step["loss"] for step in scalars]
        exact = reference(options, options.max_length, options.tuning)
    apart = [abs(a - b) / b for a, b in zip(ours, exact, strict=True)]
    print("| steps | xtuner | float32 reference | difference of the mean |\n|---|---|---|---|")
    tenth = max(1, len(ours) // 10)
    for first in range(0, len(ours), tenth):
        a, b = (statistics.mean(x[first : first + tenth]) for x in (ours, exact))
        print(f"| {first + 1}-{first + tenth} | {a:.4f} | {b:.4f} | {100 * (a / b - 1):+.2f} % |")
    print(
        f"single steps: median {100 * statistics.median(apart):.2f} %, "
        f"highest {100 * max(apart):.2f} %"
    )


if __name__ == "__main__":
    main()
