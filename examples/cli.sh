#!/usr/bin/env bash
# The command line from a model to adapters that other tools read, on real weights and texts:
# quantize, train three adapters, kill -9, resume, evaluate, generate, sweep, export, load in PEFT, merge, inspect.
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

echo "== Train three adapters at once"
"${finetuna[@]}" train --config run.yaml --out whole

echo "== The same again, but kill the process after the first step"
"${finetuna[@]}" train --config run.yaml --out run >killed.txt 2>&1 &
process=$!
until [ -f run/checkpoint.safetensors ] || ! kill -0 $process 2>/dev/null; do sleep 0.1; done
kill -9 $process 2>/dev/null || true
wait $process 2>/dev/null || true
tail -n 1 run/log.csv

echo "== Go on as if nothing had happened"
"${finetuna[@]}" train --out run --resume
for file in {milton,math,films}/adapter_model.safetensors checkpoint.safetensors; do
    cmp "whole/$file" "run/$file"
done
echo "Killed and resumed, every byte is that of the run that was never stopped."

adapters=(--adapter run/milton --adapter run/math --adapter run/films)
echo "== Every adapter on every text"
"${finetuna[@]}" eval --base base "${adapters[@]}" --max-length 96 --limit 6 --out eval.json \
    --data milton.jsonl --data math.jsonl --data films.jsonl

echo "== All of them answer, side by side"
"${finetuna[@]}" generate --base base --with-base "${adapters[@]}" --prompt "An old man had" --max-new-tokens 24

echo "== Which learning rate? All of them at once, or one after another"
"${finetuna[@]}" sweep --base base --data milton.jsonl --out sweep --lr 1e-4 --lr 3e-3 --steps 2 --max-length 96 \
    --batch-size 2 --at-once 1

echo "== What is in them"
"${finetuna[@]}" inspect base
"${finetuna[@]}" inspect run/milton

echo "== For others: an adapter for PEFT, a whole model, a mixture, and the base's own weights in float"
"${finetuna[@]}" export --base base --adapter run/milton --model "$model" milton-peft
"${finetuna[@]}" export --base base --adapter run/milton --format merged milton-model
"${finetuna[@]}" merge --base base --adapter run/milton --adapter run/films --weight 0.5 --weight 0.5 --dtype bfloat16 mixture
"${finetuna[@]}" merge --base base --adapter run/milton --weight 0 base-model
"$python" - "$model" <<'PYTHON'
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def model_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def run(model):
    out = model(**ids, labels=ids["input_ids"])
    return out.logits, out.loss.item()


tokenizer = AutoTokenizer.from_pretrained("milton-model")
ids = tokenizer("Of Mans First Disobedience, and the Fruit", return_tensors="pt")
merged, merged_loss = run(model_in("milton-model"))
frozen, frozen_loss = run(model_in("base-model"))
adapted, adapted_loss = run(PeftModel.from_pretrained(model_in("base-model"), "milton-peft"))
_, plain_loss = run(model_in(sys.argv[1]))
_, peft_loss = run(PeftModel.from_pretrained(model_in(sys.argv[1]), "milton-peft"))
_, mixed_loss = run(model_in("mixture"))
print(f"loss of the line: {plain_loss:.3f} by the model, {peft_loss:.3f} with the adapter in PEFT")
print(f"by the base: {frozen_loss:.3f}, {adapted_loss:.3f} in PEFT, {merged_loss:.3f} merged, {mixed_loss:.3f} mixed")
error, change = (float((adapted - other).abs().max()) for other in (merged, frozen))
print(f"PEFT's logits on the base's weights and the merged model's: {error:.1e} apart, the adapter's change {change:.1f}")
assert error < 1e-3 < 0.1 < change, "the adapter was lost on its way"  # float32: logits of about 30, sums of 576
assert abs(peft_loss - merged_loss) < 0.05 < plain_loss - peft_loss
assert merged_loss < mixed_loss < frozen_loss
PYTHON
