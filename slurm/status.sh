#!/usr/bin/env bash
# What every run is doing, beside what squeue says of its job:   bash slurm/status.sh [models/NAME ...]
# A run that claims to wait or to run, but has no job any more (killed hard, node failure), is marked as failed.
set -euo pipefail
cd "$(dirname "$0")/.."
set +u
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
exec python -m slurm.runs status "$@"
