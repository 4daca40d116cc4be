"""Run the benchmark task with TRL's SFTTrainer; the last line is JSON with ``tokens_per_second``.

    python benchmarks/peer_trl.py MODEL ROWS.json [--steps 6] [--tuning lora|full] [--default-dtype]
        [--four-bit] [--max-length 1024] [--checkpointing] [--liger]
        [--attention kernels-community/flash-attn2]

Packed rows, logging every step. By default weights are bfloat16, the fastest choice on a CPU;
`--default-dtype` keeps TRL's default: float32 weights and bfloat16 autocast. Runs in its own
environment, without xtuner.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds of each step, including waiting for data."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args, **kwargs):
        self.marks.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.marks.append(time.perf_counter())


def main() -> None:
    """Train a few steps and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    parser.add_argument("--default-dtype", action="store_true")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention")
    parser.add_argument("--liger", action="store_true")
    options = parser.parse_args()
    with open(options.rows) as file:
        rows = json.load(file)
    data = Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "user", "content": f"{r['instruction']}\n{r['input']}".strip()}
                ],
                "completion": [{"role": "assistant", "content": r["output"]}],
            }
            for r in rows
        ]
    )
    cuda = torch.cuda.is_available()
    wide = options.default_dtype or options.tuning == "full"
    loading: dict = {"dtype": torch.float32 if wide else torch.bfloat16}
    if options.four_bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if options.attention:
        loading["attn_implementation"] = options.attention
    if cuda:
        loading["device_map"] = "cuda"
    clock = Clock()
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, **loading),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            peft_config=lora if options.tuning == "lora" else None,
            callbacks=[clock],
            args=SFTConfig(
                output_dir=folder,
                max_steps=options.steps,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                per_device_train_batch_size=1,
                packing=True,
                max_length=options.max_length,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                bf16=True,
                use_cpu=not cuda,
                gradient_checkpointing=options.checkpointing,
                use_liger_kernel=options.liger,
                optim="paged_adamw_32bit" if options.four_bit and cuda else "adamw_torch_fused",
            ),
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [0, *(entry["num_tokens"] for entry in logs)]
    rates = [
        (seen[i + 1] - seen[i]) / (clock.marks[i + 1] - clock.marks[i]) for i in range(len(logs))
    ]
    print(
        json.dumps(
            {
                "tokens_per_second": rates,
                "losses": [entry["loss"] for entry in logs],
                "peak_mb": (
                    torch.cuda.max_memory_reserved() / 2**20
                    if cuda
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
