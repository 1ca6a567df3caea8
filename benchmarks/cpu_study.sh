#!/usr/bin/env bash
# The study on real text that one CPU can do: rebuilds every model of the README's table into models/cpu/, or the ones
# named, skips what is finished and resumes what was stopped.
#
#   bash benchmarks/cpu_study.sh [teacher] [baseline] [student] [baseline-long] [student-long] [student-long-lambda1]
#                                [--seed N] [key=value ...]
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
    teacher | baseline | student | baseline-long | student-long | student-long-lambda1) models+=("$1"); shift ;;
    *=*) keys+=("$1"); shift ;;
    *) echo "error: $1 is none of teacher, baseline, student, baseline-long, student-long, student-long-lambda1, --seed N, key=value" >&2; exit 2 ;;
  esac
done
((${#models[@]})) || models=(teacher baseline student baseline-long student-long student-long-lambda1)

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
    student-long | student-long-lambda1) run student "$model" "${seeds[0]}" ;;
  esac
done

# Score what is there on the whole dev set and print the table.
shopt -s nullglob
finished=(models/cpu/*/run/finished.json)
"$python" -m babylm.scoring "${finished[@]%/run/finished.json}" --corpus corpus_cpu --eval corpus_cpu_dev
"$python" visual.py "${finished[@]%/run/finished.json}" --table --output figures/cpu
