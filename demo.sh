#!/usr/bin/env bash
# The whole pipeline in minutes on two CPU cores: an embedded corpus, a teacher, a baseline, a distilled student, a
# mixture-of-experts student, a student that learns from rewards, a table and figures.
#
#   bash demo.sh [--seed N] [key=value ...]     keys of configs/demo/, e.g. training.steps=100 corpus.demo_words=50K
#   bash demo.sh --install                      only make .venv and install requirements.txt
#
# Reads nothing but this repository; writes .venv/, data/, models/ and figures/. A second call skips what is finished.
set -euo pipefail
cd "$(dirname "$0")"

seed=1
only_install=
corpus_keys=()
training_keys=()
while (($#)); do
  case $1 in
    --seed) seed=${2:?--seed needs a number}; shift 2 ;;
    --install) only_install=yes; shift ;;
    corpus.*=* | tokenizer.*=*) corpus_keys+=("$1"); shift ;;
    *=*) training_keys+=("$1"); shift ;;
    *) echo "usage: bash demo.sh [--seed N | --install] [key=value ...]" >&2; exit 2 ;;
  esac
done

# ---- Install ----------------------------------------------------------------------------------------------------------
if [ ! -x .venv/bin/python ]; then
  found=
  for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$python; break; fi
  done
  [ -n "$found" ] || { echo "error: no Python of version 3.11 or newer found" >&2; exit 1; }
  echo "making .venv with $("$found" --version)"
  "$found" -m venv .venv
fi
stamp=.venv/requirements.installed
if ! cmp -s requirements.txt "$stamp"; then
  echo "installing requirements.txt (a few minutes, once)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$stamp"
fi

[ -z "$only_install" ] || exit 0

# ---- Run --------------------------------------------------------------------------------------------------------------
# Seed 1 uses the configs as they are; every other seed gets folders of its own.
suffix=$([ "$seed" = 1 ] || echo "-s$seed")
data=data/demo$suffix
runs=models/demo$suffix
common=("data.corpus=$data/corpus" "output=$runs" "seed=$seed" ${training_keys[@]+"${training_keys[@]}"})
stage() { echo; echo "== $*"; .venv/bin/python "$@"; }

began=$SECONDS
stage combine_babylm.py --config configs/demo/corpus.yaml --input "$data/raw" --output "$data/corpus" "seed=$seed" \
  ${corpus_keys[@]+"${corpus_keys[@]}"}
stage train_teacher.py --config configs/demo/teacher.yaml "${common[@]}"
stage train_baseline.py --config configs/demo/baseline.yaml "${common[@]}"
stage train_student.py --config configs/demo/student.yaml "${common[@]}" "distillation.teacher=$runs/teacher"
stage train_moep_student.py --config configs/demo/moep.yaml "${common[@]}" "distillation.teacher=$runs/teacher"
stage ppo.py --config configs/demo/ppo.yaml "${common[@]}" "model.path=$runs/student" "rewards.0.teacher=$runs/teacher"
stage -m babylm.scoring "$runs/teacher" "$runs/baseline" "$runs/student" "$runs/moep" "$runs/ppo" --ngram "$runs/5-gram" \
  --corpus "$data/corpus" --pairs "$data/corpus/pairs" --seq_len 64
stage visual.py "$runs/5-gram" "$runs/teacher" "$runs/baseline" "$runs/student" "$runs/moep" "$runs/ppo" --table --output "figures/demo$suffix"
echo
echo "done in $((SECONDS - began)) s. Figures: figures/demo$suffix/ Next: README.md, \"A real run\""
