#!/usr/bin/env bash
# The study on real text that one CPU can do: rebuilds every model of the tables in RESULTS.md into models/cpu/, or the ones
# named, skips what is finished and resumes what was stopped.
#
#   bash benchmarks/cpu_study.sh [model ...] [--seed N ...] [key=value ...]
#
#   teacher teacher-gpt2          the two teachers: a Llama and a GPT-2
#   tune                          a few settings of every method, 400 steps each, seed 0, into models/cpu-tune/
#   baseline student student-two student-dskd                       seeds 1 2 3 (or those given)
#   student-aux student-contrastive student-self lambda             first seed; lambda: 0.5, 1, 4 and 128
#   moep moep-none dense dense-none                                 first two seeds: MoE-P and a dense GPT-2 of equal size
#   moep-ablations                                                  first seed: balance weight 0 and 0.2, top-1 and top-4
#   baseline-long student-long student-long-lambda1                 three times the steps, first seed
#   ppo ppo-random                                                  first two seeds, first seed: student-s1 learns from rewards
#
# Reads *.train from $BABYLM_SHARED/data/train_10M and *.dev from $BABYLM_SHARED/data/dev where that variable is set,
# else from train_10M/ and dev/. PYTHON picks the interpreter, THREADS the CPU threads of each run (default: all).
set -euo pipefail
cd "$(dirname "$0")/.."

every=(teacher teacher-gpt2 tune baseline student student-two student-dskd student-aux student-contrastive student-self lambda
       moep moep-none dense dense-none moep-ablations baseline-long student-long student-long-lambda1 ppo ppo-random)
models=()
seeds=()
keys=(${THREADS:+training.threads=$THREADS})
while (($#)); do
  case $1 in
    --seed) seeds+=("$2"); shift 2 ;;
    *=*) keys+=("$1"); shift ;;
    *)
      if [[ " ${every[*]} " != *" $1 "* ]]; then
        echo "error: $1 is none of ${every[*]}, --seed N, key=value" >&2
        exit 2
      fi
      models+=("$1"); shift ;;
  esac
done
((${#models[@]})) || models=("${every[@]}")
((${#seeds[@]})) || seeds=(1 2 3)
first=${seeds[0]}

python=${PYTHON:-.venv/bin/python}
[ -x .venv/bin/python ] || [ -n "${PYTHON:-}" ] || bash demo.sh --install
data=${BABYLM_SHARED:+$BABYLM_SHARED/data/}

"$python" combine_babylm.py --config configs/cpu/corpus.yaml --input "${data}train_10M"
"$python" combine_babylm.py --config configs/cpu/dev.yaml --input "${data}dev"

run() { # config, name, seed, further keys: stage 3, 4 or 5 by the config's name; the teacher's states are captured first
  local config=configs/cpu/$1.yaml stage=student cached=yes
  [[ $1 == baseline* ]] && stage=baseline
  [[ $1 == moep* ]] && stage=moep_student
  [[ $1 == baseline* || $1 == *-none ]] && cached=
  set -- "$config" "name=$2" "seed=$3" "${@:4}" ${keys[@]+"${keys[@]}"}
  [ -z $cached ] || "$python" -m babylm.teacher_cache --config "$@"
  "$python" "train_$stage.py" --config "$@"
}
tune() { # config, name, further keys: a short run, to choose by validation CE
  run "$1" "$2" 0 output=models/cpu-tune training.steps=400 logging.eval_steps=400 checkpoints.milestones=false \
    checkpoints.every_words=null "${@:3}"
}

for model in "${models[@]}"; do
  case $model in
    teacher*) "$python" train_teacher.py --config "configs/cpu/$model.yaml" ${keys[@]+"${keys[@]}"} ;;
    tune)
      for lr in 1e-3 2e-3 4e-3; do tune baseline "baseline-lr$lr" "training.lr=$lr"; done
      tune student student-lambda9-T1
      tune student student-lambda9-T2 distillation.temperature=2
      tune student student-lambda2-T1 distillation.alpha=0.3333
      tune student-two two-logits
      tune student-two two-probabilities distillation.combine=probabilities
      tune student-dskd dskd-0p1-normalised distillation.hidden.weight=0.1 distillation.hidden.normalise=true
      tune student-dskd dskd-1-normalised distillation.hidden.weight=1 distillation.hidden.normalise=true
      tune student-dskd dskd-0p1-raw distillation.hidden.weight=0.1 distillation.hidden.normalise=false
      tune student-aux aux-0p1-adaptive distillation.auxiliary.weight=0.1 distillation.auxiliary.weighting=adaptive
      tune student-aux aux-0p1-fixed distillation.auxiliary.weight=0.1 distillation.auxiliary.weighting=fixed
      tune student-contrastive contrastive-0p1-tau0p1 distillation.contrastive.weight=0.1 distillation.contrastive.temperature=0.1
      tune student-contrastive contrastive-0p01-tau0p1 distillation.contrastive.weight=0.01 distillation.contrastive.temperature=0.1
      tune student-contrastive contrastive-0p1-tau2 distillation.contrastive.weight=0.1 distillation.contrastive.temperature=2
      for lr in 2e-3 4e-3 8e-3; do
        tune moep-none "moep-lr$lr" "training.lr=$lr"
        tune dense-none "dense-lr$lr" "training.lr=$lr"
      done
      ;;
    baseline | student | student-two | student-dskd) for seed in "${seeds[@]}"; do run "$model" "$model-s$seed" "$seed"; done ;;
    moep | moep-none | dense | dense-none) for seed in "${seeds[@]:0:2}"; do run "$model" "$model-s$seed" "$seed"; done ;;
    ppo) for seed in "${seeds[@]:0:2}"; do "$python" ppo.py --config configs/cpu/ppo.yaml "name=ppo-s$seed" "seed=$seed" \
      ${keys[@]+"${keys[@]}"}; done ;;
    ppo-random) "$python" ppo.py --config configs/cpu/ppo.yaml "name=ppo-random-s$first" "seed=$first" "rewards=[{kind: random}]" \
      ${keys[@]+"${keys[@]}"} ;;
    moep-ablations)
      run moep "moep-balance0-s$first" "$first" distillation.balance.weight=0
      run moep "moep-balance0p2-s$first" "$first" distillation.balance.weight=0.2
      run moep "moep-top1-s$first" "$first" model.experts_per_token=1
      run moep "moep-top4-s$first" "$first" model.experts_per_token=4
      ;;
    lambda) # w_ce + w_kl = 1, so alpha = 1 / (1 + lambda)
      run student "student-lambda0p5-s$first" "$first" distillation.alpha=0.666667
      run student "student-lambda1-s$first" "$first" distillation.alpha=0.5
      run student "student-lambda4-s$first" "$first" distillation.alpha=0.2
      run student "student-lambda128-s$first" "$first" distillation.alpha=0.00775194
      ;;
    *) run "$model" "$model-s$first" "$first" ;;
  esac
done

# Score what is there on the whole dev set, print every run, and the methods side by side.
shopt -s nullglob
finished=(models/cpu/*/run/finished.json)
"$python" -m babylm.scoring "${finished[@]%/run/finished.json}" --corpus corpus_cpu --eval corpus_cpu_dev
"$python" visual.py "${finished[@]%/run/finished.json}" --table --output figures/cpu
"$python" -m benchmarks.study_table models/cpu --control baseline
[ -z "$(compgen -G "models/cpu/dense-none-*/run/finished.json")" ] ||
  "$python" -m benchmarks.study_table models/cpu --control dense-none --only moep dense
