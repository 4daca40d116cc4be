#!/usr/bin/env bash
# The main job in one command: fetch a small chat model, write data, fine-tune, show what to do next.
# Every step is an xtuner command that is printed before it runs; a second run reuses model and answers.
set -euo pipefail
name="${1:-Ada}"
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
run() { printf '$ %s\n' "$*"; "$bin/$@"; }

step "1/3  A small chat model: SmolLM2-135M-Instruct"
echo '$ xtuner fetch smollm2_135m_instruct'
model="$("$bin/xtuner" fetch smollm2_135m_instruct)"
echo "$model"

step "2/3  Data: who the assistant of $name is, and what it knew before"
run python "$here/make_data.py" "$model" --name "$name" --out "$out/data.jsonl"

step "3/3  Fine-tuning with LoRA; the same questions before, during and after"
run xtuner train "$here/assistant.py" --work-dir "$out/work_dir" --overwrite

cat <<TEXT

The assistant knows its name. Go on with:

  chat with it              $bin/xtuner chat $out/work_dir
  make it one whole model   $bin/xtuner convert merge $model $out/work_dir $out/merged
  train on your own data    $bin/xtuner copy-cfg smollm2_135m_instruct_lora_custom_e3 .   (then edit and train it)

Loss curve, answers and logs: $out/work_dir/  (the newest folder with a date)
TEXT
