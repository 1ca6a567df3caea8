#!/usr/bin/env bash
# The study on real text that one CPU can do: rebuilds every model of the README's table into models/cpu/, or the ones
# named, skips what is finished and resumes what was stopped.
#
#   bash benchmarks/cpu_study.sh [teacher] [baseline] [student] [baseline-long] [student-long] [--seed N] [key=value ...]
#
# Reads *.train from $BABYLM_SHARED/data/train_10M and *.dev from $BABYLM_SHARED/data/dev where that variable is set,
# else from train_10M/ and dev/. PYTHON picks the interpreter, THREADS the CPU threads of each run (default: all).
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=(1 2 3)
models=()
keys=(${THREADS:+training.threads=$THREADS})
while (($#)); do
  case $1 in
    --seed) seeds=("$2"); shift 2 ;;
    teacher | baseline | student | baseline-long | student-long) models+=("$1"); shift ;;
    *=*) keys+=("$1"); shift ;;
    *) echo "error: $1 is none of teacher, baseline, student, baseline-long, student-long, --seed N" >&2; exit 2 ;;
  esac
done
((${#models[@]})) || models=(teacher baseline student baseline-long student-long)

python=${PYTHON:-.venv/bin/python}
[ -x .venv/bin/python ] || [ -n "${PYTHON:-}" ] || bash demo.sh --install
data=${BABYLM_SHARED:+$BABYLM_SHARED/data/}

"$python" combine_babylm.py --config configs/cpu/corpus.yaml --input "${data}train_10M"
"$python" combine_babylm.py --config configs/cpu/dev.yaml --input "${data}dev"

run() { # stage, config, seed
  "$python" "train_$1.py" --config "configs/cpu/$2.yaml" "name=$2-s$3" "seed=$3" ${keys[@]+"${keys[@]}"}
}
for model in "${models[@]}"; do
  case $model in
    teacher) "$python" train_teacher.py --config configs/cpu/teacher.yaml ${keys[@]+"${keys[@]}"} ;;
    baseline) for seed in "${seeds[@]}"; do run baseline baseline "$seed"; done ;;
    student) for seed in "${seeds[@]}"; do run student student "$seed"; done ;;
    baseline-long) run baseline baseline-long "${seeds[0]}" ;;
    student-long) run student student-long "${seeds[0]}" ;;
  esac
done
