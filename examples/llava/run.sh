#!/usr/bin/env bash
# Give a small language model eyes: a vision tower, a projector, questions about images.
# Every step is a command that is printed before it runs.
set -euo pipefail
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart-llava

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }
run() { printf '$ %s\n' "$*"; "$bin/$@"; }

step "1/5  A small language model: SmolLM2-135M-Instruct"
echo '$ xtuner fetch smollm2_135m_instruct'
"$bin/xtuner" fetch smollm2_135m_instruct

step "2/5  Images of handwritten digits, and a small CLIP that learns to tell them apart"
run python "$here/make_data.py" --out "$out"
run python "$here/train_clip.py" --out "$out/clip"

step "3/5  Stage 1: a projector, from images and captions; all else is frozen"
run xtuner train "$here/pretrain.py" --work-dir "$out/pretrain" --overwrite

step "4/5  Stage 2: the projector and LoRA adapters, from questions and answers"
run xtuner train "$here/finetune.py" --work-dir "$out/finetune" --overwrite

step "5/5  Questions about images with digits that nothing was trained on"
run python "$here/evaluate.py" "$out"

cat <<TEXT

The model sees. Go on with:

  ask it yourself         $bin/xtuner chat $out/finetune --image $out/images/test_00001.png
  hand it to other tools  $bin/xtuner convert pth_to_hf $here/finetune.py $out/finetune $out/whole --save-format huggingface
TEXT
