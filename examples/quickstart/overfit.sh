#!/usr/bin/env bash
# What not to do: fine-tune on a single repeated introduction. The model learns its name and forgets the rest.
set -euo pipefail
name="${1:-Ada}"
bin="$(dirname "${PYTHON:-.venv/bin/python}")"
here="$(dirname "$0")"
out=quickstart
mkdir -p "$out"

"$bin/xtuner" fetch smollm2_135m_instruct >/dev/null
"$bin/python" - "$name" "$out/overfit.jsonl" <<'PY'
import json, sys
name, path = sys.argv[1:]
messages = [
    {"role": "user", "content": "Please introduce yourself."},
    {"role": "assistant", "content": f"I am {name}'s little assistant, ready to help you."},
]
with open(path, "w", encoding="utf-8") as file:
    for _ in range(600):
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
PY
echo "600 rows, all the same introduction. Watch the answer about France:"
"$bin/xtuner" train "$here/assistant.py" --work-dir "$out/overfit" --overwrite \
  --set "data_path=$out/overfit.jsonl" --set lr=2e-3 --set max_steps=60 --set evaluation_freq=15

cat <<TEXT

The loss went to zero, and the model answers every question with its introduction: this is overfitting.
'make quickstart' avoids it with varied phrasings, mixed with general conversations.
TEXT
