#!/usr/bin/env bash
# The runs of a sweep as arrays of jobs, those that read others (a student its teacher) after these. Prints the job ids.
#
#   bash slurm/submit_sweep.sh configs/sweeps/lambda.yaml -- --partition=gpu --gpus=1
#   bash slurm/submit_sweep.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
set +u
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
exec python -m slurm.sweep "$@"
