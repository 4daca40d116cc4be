"""A plain QLoRA loop with transformers, peft and bitsandbytes, following their examples.

    python benchmarks/peer_plain.py MODEL ROWS.json [--steps 6] [--max-length 1024]

NF4 with double quantization, LoRA r=64 on all linear layers, samples concatenated to `max-length`
tokens with a causal mask over the row, loss of the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    """Train a few steps and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.rows) as file:
        rows = json.load(file)
    stream: list[int] = []
    for row in rows:
        messages = [
            {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
            {"role": "assistant", "content": row["output"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) > options.steps * options.max_length:
            break
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    rates, losses = [], []
    for step in range(options.steps):
        part = stream[step * options.max_length : (step + 1) * options.max_length]
        start = time.perf_counter()
        ids = torch.tensor([part])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(len(part) / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens_per_second": rates, "losses": losses, "peak_mb": peak}))


if __name__ == "__main__":
    main()
