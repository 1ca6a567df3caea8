#!/usr/bin/env bash
# Zero-shot evaluation with the official script's usage:
#   eval/eval_zero_shot.sh <model path> <backend: causal|mlm|mntp> [data path]
# More options: python -m eval.zero_shot --help
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: eval/eval_zero_shot.sh <model path> <backend: causal|mlm|mntp> [data path]" >&2
    exit 2
fi
model=$(realpath "$1") data=$(realpath -m "${3:-evaluation_data/full_eval}")
output=$(realpath -m results)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python; }
exec "$python" -m eval.zero_shot "$model" --backend "$2" --data "$data" --output "$output"
