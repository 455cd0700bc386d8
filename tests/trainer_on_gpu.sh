#!/usr/bin/env bash
# The trainer on a real device, in about five minutes on one H100: train through both switches, kill, resume, evaluate with
# lm-eval, export, compare with transformers, generate, masks between documents, branch.  A part that fails stops no other.
#   tests/trainer_on_gpu.sh TOKENS FOLDER [SIZE] [BINDING...]      TOKENS: a folder that train.prepare wrote
set -uo pipefail
set -m  # background jobs get a process group of their own
tokens=$1; out=$2; size=${3:-125m}; shift 3 || shift $#
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
run=$out/run; mkdir -p "$out"
step() { echo; echo "=== $1 ($(date +%T))"; }
train() {
  timeout --foreground 240 python3 -m train.main --gin_file=configs/size/$size.gin --gin_file=configs/recipe/venom.gin \
    --gin_bindings="Data.folder='$tokens'" --gin_bindings="Train.steps=200" --gin_bindings="DENSE_UNTIL=40" --gin_bindings="SPARSE_UNTIL=140" \
    --gin_bindings="Train.batch_size=64" --gin_bindings="Train.seq_len=1024" --gin_bindings="Train.accumulation=2" --gin_bindings="Train.remat='none'" \
    --gin_bindings="LearningRate.warmup=30" --gin_bindings="LearningRate.peak=1e-3" --gin_bindings="Train.eval_every=50" --gin_bindings="Train.eval_batches=4" \
    --gin_bindings="Train.checkpoint_every=50" --gin_bindings="Train.keep_checkpoints=4" --gin_bindings="Train.log_every=5" \
    --gin_bindings="Train.diagnosis_every=50" --gin_bindings="Train.sample_tokens=40" --gin_bindings="Train.sample_every=100" "${extra[@]}" "$@"
}
extra=(); for one in "$@"; do extra+=("--gin_bindings=$one"); done
average=(--gin_bindings="Optimizer.ema=0.98")

step "train until step 75, then SIGKILL"
train "${average[@]}" --workdir=$run > $out/first.log 2>&1 & pid=$!
for _ in $(seq 600); do
  sleep 0.3; kill -0 $pid 2>/dev/null || break
  [ -f $run/metrics.jsonl ] && grep -q '"step": \(75\|80\|85\|90\), "kind": "train"' $run/metrics.jsonl && [ -f $run/checksums/50.json ] && break
done
kill -KILL -- -$pid; wait $pid 2>/dev/null; echo "killed: rc $?"
tail -3 $out/first.log; ls $run/checkpoints

step "resume to the end"
train "${average[@]}" --workdir=$run > $out/second.log 2>&1; echo "rc $?"; grep -v '^step [0-9]*/' $out/second.log | tail -12; grep '^step [0-9]*/' $out/second.log | tail -2
grep -c '"kind": "train"' $run/metrics.jsonl

step "evaluate: last step; step 100 inside the sparse phase, both forwards; averaged weights"
python3 -m train.evaluate --workdir=$run 2>&1 | tail -1
python3 -m train.evaluate --workdir=$run@100 --sparse 2>&1 | tail -1
python3 -m train.evaluate --workdir=$run --ema --text=README.md 2>&1 | tail -1

step "evaluate: six tasks from local items"
timeout 120 python3 -m train.evaluate --workdir=$run --tasks=arc_easy,arc_challenge,piqa,openbookqa,hellaswag,winogrande --eval_data_dir=tests/data/eval > $out/tasks.log 2>&1; echo "rc $?"; tail -22 $out/tasks.log

step "export, and transformers' own logits"
python3 -m train.export --workdir=$run --output=$out/hf --dtype=float32 2>&1 | tail -1
python3 -m train.export --workdir=$run --output=$out/hf-ema --ema 2>&1 | tail -1
timeout 120 python3 - <<PY 2>&1 | tail -4
import numpy as np, torch, jax, jax.numpy as jnp
from transformers import AutoModelForCausalLM, AutoTokenizer
from train import evaluate, model
from venom_jax import Recipe
run = evaluate.restore("$run")
ids = AutoTokenizer.from_pretrained("$out/hf")("The house of the people is a state of the mind, and").input_ids
with torch.no_grad():
    theirs = AutoModelForCausalLM.from_pretrained("$out/hf")(torch.tensor([ids])).logits[0].numpy()
with jax.default_matmul_precision("highest"):
    ours = np.asarray(model.assemble(run.graphdef, run.dense_params(), run.state.method)(jnp.asarray([ids]), recipe=Recipe.dense())[0][0])
print("parity: largest difference", np.abs(ours - theirs).max(), "of logits up to", np.abs(theirs).max())
PY

step "generate"
python3 -m train.generate --workdir=$run --prompt="The state of" --new_tokens=60 2>&1 | tail -3

step "masks between documents through cuDNN: 30 steps with and without"
short=(--gin_bindings="Train.steps=30" --gin_bindings="Phases.schedule=[(0,'dense')]" --gin_bindings="LearningRate.warmup=5" --gin_bindings="Train.sample_tokens=0")
for mask in None 0; do
  train "${short[@]}" --gin_bindings="Model.document_start=$mask" --workdir=$run-mask-$mask > $out/mask-$mask.log 2>&1; echo "document_start=$mask rc $?"; grep '"step": 25, "kind": "train"' $run-mask-$mask/metrics.jsonl | cut -c1-400
done
step "branch the last half from step 100 with another decay (full state)"
train "${average[@]}" --gin_bindings="LearningRate.kind='wsd'" --gin_bindings="Train.steps=130" --gin_bindings="SPARSE_UNTIL=120" --gin_bindings="LearningRate.decay=20" --init_from=$run@100 --init_state --workdir=$run-branch > $out/branch.log 2>&1; echo "rc $?"; grep -v '^step [0-9]*/' $out/branch.log | tail -4
step end
