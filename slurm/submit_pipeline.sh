#!/usr/bin/env bash
# All stages as jobs, each after those whose results it reads (afterok). Prints the job ids; submits nothing if an input is missing.
#
#   bash slurm/submit_pipeline.sh                                        # configs/10M: corpus, teacher, baseline, student, moep, ppo, figures
#   bash slurm/submit_pipeline.sh --configs configs/demo output=models/demo-slurm
#   bash slurm/submit_pipeline.sh --stages teacher,baseline,student -- --partition=gpu --gpus=1 --time=12:00:00
#   bash slurm/submit_pipeline.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
set +u
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
exec python -m slurm.pipeline "$@"
