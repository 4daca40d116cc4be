#!/usr/bin/env bash
# Add image input to a small language model: a vision tower, a projector, questions about images.
# Every command is printed before it runs.
set -euo pipefail
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart-llava

source "$(dirname "$0")/../steps.sh"

step "1/5  A small language model: SmolLM2-135M-Instruct"
run xtuner fetch smollm2_135m_instruct

step "2/5  Generate images of handwritten digits and train a small CLIP on them"
run python "$here/make_data.py" --out "$out"
run python "$here/train_clip.py" --out "$out/clip"

step "3/5  Stage 1: train the projector on images and captions"
run xtuner train "$here/pretrain.py" --work-dir "$out/pretrain" --overwrite

step "4/5  Stage 2: train the projector and LoRA adapters on questions and answers"
run xtuner train "$here/finetune.py" --work-dir "$out/finetune" --overwrite

step "5/5  Ask questions about images of held-out digits"
run python "$here/evaluate.py" "$out"

cat <<TEXT

The model now takes images. Next steps:

  chat about an image     $bin/xtuner chat $out/finetune --image $out/images/test_00001.png
  export it               $bin/xtuner convert pth_to_hf $here/finetune.py $out/finetune $out/exported --save-format huggingface
TEXT
