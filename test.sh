#!/usr/bin/env bash
# Install what the tests need into .venv and run them:  bash test.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")"

bash demo.sh --install
stamp=.venv/requirements.tests.installed
if ! cmp -s tests/requirements.txt "$stamp"; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
  cp tests/requirements.txt "$stamp"
fi
.venv/bin/python -m ruff check .
unset PYTHONDONTWRITEBYTECODE  # else each of the processes that the tests start compiles every file of ours again
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # two processes, a file each: half the time on two cores
