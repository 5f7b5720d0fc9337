#!/usr/bin/env bash
# The command line from a model to adapters that other tools read, on real weights and texts:
# quantize, train three adapters, kill -9, resume, evaluate, generate, export, load in PEFT.
#
#     pip install '.[cli,bench]'
#     examples/cli.sh [FOLDER]
#
# STEPS=n trains longer. FINETUNA and PYTHON say which commands to run.
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra finetuna <<<"${FINETUNA:-finetuna}"
python=${PYTHON:-python}
steps=${STEPS:-12}
mkdir -p "${1:-runs/cli}"
cd "${1:-runs/cli}"

echo "== Three texts in the three formats"
model=$(PYTHONPATH=$examples "$python" - <<'PYTHON'
import json
from pathlib import Path

import real_data


def write(name, examples):
    Path(name).write_text("".join(json.dumps(example) + "\n" for example in examples))


texts = real_data.texts("milton", "math", "reviews")
verses, films = texts["milton"].splitlines(), texts["reviews"].splitlines()
problems = [p.split("Answer:") for p in texts["math"].split("Question:")[1:41]]
write("milton.jsonl", [{"text": "\n".join(verses[i : i + 6])} for i in range(600, 840, 6)])
write("math.jsonl", [{"prompt": f"Question:{q}Answer:", "completion": a.rstrip()} for q, a in problems])
question = {"role": "user", "content": "What did you think of the film?"}
write("films.jsonl", [{"messages": [question, {"role": "assistant", "content": line}]} for line in films[:40]])
print(real_data.smollm2_path())
PYTHON
)

echo "== Quantize once"
"${finetuna[@]}" quantize "$model" base --all

cat >run.yaml <<YAML
base: base
data: [milton.jsonl, math.jsonl, films.jsonl]
learning_rate: [3e-3, 1e-3, 3e-3]
rank: [8, 16, 4]
steps: [$steps]
max_length: [96]
batch_size: 2
eval_fraction: 0.1
eval_every: $steps
save_every: 1
YAML

echo "== Train three adapters at once, and kill the process after the first step"
"${finetuna[@]}" train --config run.yaml --out run >killed.txt 2>&1 &
process=$!
until [ -f run/checkpoint.safetensors ] || ! kill -0 $process 2>/dev/null; do sleep 0.1; done
kill -9 $process 2>/dev/null || true
wait $process 2>/dev/null || true
tail -n 1 run/log.csv

echo "== Go on as if nothing had happened"
"${finetuna[@]}" train --out run --resume

adapters=(--adapter run/milton --adapter run/math --adapter run/films)
echo "== Every adapter on every text"
"${finetuna[@]}" eval --base base "${adapters[@]}" --max-length 96 --limit 6 --out eval.json \
    --data milton.jsonl --data math.jsonl --data films.jsonl

echo "== All of them answer, side by side"
"${finetuna[@]}" generate --base base --with-base "${adapters[@]}" --prompt "An old man had" --max-new-tokens 24

echo "== What is in them"
"${finetuna[@]}" inspect run/milton

echo "== For others: an adapter for PEFT, and a whole model"
"${finetuna[@]}" export --base base --adapter run/milton --model "$model" milton-peft
"${finetuna[@]}" export --base base --adapter run/milton --format merged milton-model
"$python" - "$model" <<'PYTHON'
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("milton-model")
ids = tokenizer("Of Mans First Disobedience, and the Fruit", return_tensors="pt")
merged = AutoModelForCausalLM.from_pretrained("milton-model", dtype=torch.float32)(**ids, labels=ids["input_ids"]).loss
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
without = plain(**ids, labels=ids["input_ids"]).loss
adapted = PeftModel.from_pretrained(plain, "milton-peft")(**ids, labels=ids["input_ids"]).loss
print(f"loss of the line: {without:.3f} by the model, {adapted:.3f} with PEFT, {merged:.3f} by the merged model")
assert abs(adapted - merged) < 0.05 < without - adapted, "the adapter was lost on its way"
PYTHON
