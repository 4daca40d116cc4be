#!/usr/bin/env bash
# The main job in one command: fetch a small chat model, write data, fine-tune, show what to do next.
# Every step is a command that is printed before it runs, and can be copied.
set -euo pipefail
name="${1:-Ada}"
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart

source "$(dirname "$0")/../steps.sh"

step "1/3  A small chat model: SmolLM2-135M-Instruct"
printf '$%s\n' "$(quoted "$bin/xtuner" fetch smollm2_135m_instruct)"
model="$("$bin/xtuner" fetch smollm2_135m_instruct)"
echo "$model"

step "2/3  Data: who the assistant of $name is, and what it knew before"
run python "$here/make_data.py" "$model" --name "$name" --out "$out/data.jsonl"

step "3/3  Fine-tuning with LoRA; the same questions before, during and after"
run xtuner train "$here/assistant.py" --work-dir "$out/work_dir" --overwrite

cat <<TEXT

The assistant knows its name. Go on with:

  chat with it             $(quoted "$bin/xtuner" chat "$out/work_dir")
  merge it into one model  $(quoted "$bin/xtuner" convert merge "$model" "$out/work_dir" "$out/merged")
  train on your own data   $(quoted "$bin/xtuner" copy-cfg smollm2_135m_instruct_lora_custom .)   (then edit and train it)

Report, loss curve, answers and logs: $out/work_dir/  (open report.html)
TEXT
