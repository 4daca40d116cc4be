#!/usr/bin/env bash
# Teach a small chat model to call tools: made-up data, fine-tuning, measured before and after.
# Every step is an xtuner command that is printed before it runs; a second run reuses the model.
set -euo pipefail
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart-tools

source "$(dirname "$0")/../steps.sh"

measure() {
  echo "Requests in other words, for the 13 tools of the training data:"
  run xtuner evaluate-tools "$1" "$out/seen.jsonl" --max-new-tokens 60
  echo "Requests for 5 tools that training never shows:"
  run xtuner evaluate-tools "$1" "$out/held_out.jsonl" --max-new-tokens 60
}

step "1/5  A small chat model: SmolLM2-135M-Instruct"
printf '$%s\n' "$(quoted "$bin/xtuner" fetch smollm2_135m_instruct)"
model="$("$bin/xtuner" fetch smollm2_135m_instruct)"
echo "$model"

step "2/5  Data: requests, calls, results and answers"
run python "$here/make_data.py" --out "$out"

step "3/5  Before"
measure "$model"

step "4/5  Fine-tuning with LoRA"
run xtuner train "$here/calls.py" --work-dir "$out/work_dir" --overwrite

step "5/5  After"
measure "$out/work_dir"
echo
echo "What is 37 times 49?"
run xtuner chat "$out/work_dir" --tools calculator --yes --ask "What is 37 times 49?"

cat <<TEXT

The model calls tools. Go on with:

  chat, with tools of your own   $bin/xtuner chat $out/work_dir --tools my_tools.py --tools calculator
  what it learned                $bin/xtuner log-dataset $here/calls.py

docs/tools.md describes data, layouts, tools and how they are measured.
TEXT
