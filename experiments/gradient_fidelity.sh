#!/usr/bin/env bash
# How far each target's gradient is from full distillation's: the tables of docs/gradients.md.
#
#   experiments/gradient_fidelity.sh TEXT OTHER_TEXT WORK
#
# TEXT is some 500 kB of plain text or more (State of the Union addresses, 1945 to 2006, in the
# committed results): a student of 4 layers, width 128, is trained on its first 210 000 bytes, and
# gradients are measured on its last 300 000. OTHER_TEXT is text of another kind (Genesis, World
# English Bible). Everything but the results is written to WORK. The teacher is the demo's,
# SmolLM2-135M-Instruct with 4-bit weights. About an hour and a half on one slow core.
set -euo pipefail
text=$(realpath "$1") other=$(realpath "$2") work=$3
results=$(cd "$(dirname "$0")" && pwd)/results
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
teacher=$(python -c 'from sparselogits.teacher.demo_model import demo_model; print(demo_model())')
mkdir -p "$work"
cd "$work"

utf8() { iconv -c -f UTF-8 -t UTF-8; } # mends a character that the cut divides
{ iconv -f UTF-8 -t UTF-8 "$text" 2>/dev/null || iconv -f LATIN1 -t UTF-8 "$text"; } >whole.txt
head -c 210000 whole.txt | utf8 >train.txt
tail -c 300000 whole.txt | utf8 >heldout.txt

sparselogits cache --teacher "$teacher" --data train.txt --out cache \
    --window 256 --windows-per-shard 32 --budget 12 --separator-id 0
cat >recipe.yaml <<YAML
cache: cache
out: trained
num_train_epochs: 2
per_device_train_batch_size: 4
learning_rate: 3.0e-3
logging_steps: 20
student: {hidden_size: 128, layers: 4, heads: 4}
YAML
sparselogits train recipe.yaml

measure() { # measure RESULT STUDENT TEXT OPTION...
    sparselogits gradients "$2" --teacher "$teacher" --data "$3" --separator-id 0 --window 512 \
        --budget 12 --draws 2 --out "$results/gradients_$1.json" "${@:4}"
}
sizes=(--batch 512 --batch 2048 --batch 8192)
rules=(--missing-mass drop --missing-mass renormalise)
measure trained_state-of-the-union trained heldout.txt "${sizes[@]}" --batches 1 "${rules[@]}"
measure genesis trained "$other" "${sizes[@]}" --batches 1 "${rules[@]}" --fresh
measure rules_state-of-the-union trained heldout.txt "${sizes[@]}" --batches 1 --top-k 12 \
    "${rules[@]}" --missing-mass smooth --missing-mass ghost --missing-mass ground_truth
measure adaptive_state-of-the-union trained heldout.txt --batch 512 --batches 8 --top-k 12 \
    --adaptive trained/model

# A student that has learnt nothing, by itself for the longest text. (Its seed in the committed
# result was torch's own; the file has the hash of the weights.)
python - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("trained/model"))
model.save_pretrained("fresh-student")
PYTHON
measure fresh_state-of-the-union fresh-student heldout.txt "${sizes[@]}" --batches 2 "${rules[@]}"
