#!/usr/bin/env bash
# Run the unmodified official pipeline on a finished run, main and all milestones, and compare its results with ours.
#
#   bash eval/official.sh <clone of the official pipeline> models/<name> [causal|mlm|mntp] [data folder] [options]
#
# The data folder holds full_eval/ (for main) and fast_eval/ (for milestones); default: the clone's evaluation_data/.
# Options:  --venv DIR           where the pipeline's own environment is made, once (default: <clone>-venv)
#           --requirements FILE  what goes into it (default: eval/requirements-official.txt)
#           --python FILE        use this Python instead, as it is
#           all others go to `python -m eval.official run`; its --help lists them (--fast, --revisions, --ours, --no-compare, ...)
#
# Reads the run folder and results/<name>/ (python -m eval.zero_shot writes it); writes <clone>/results/<name>/, <clone>-venv/ and
# <clone>-hub/. Run again after an interruption, it continues with the first revision that is not done.
# Exit code: 0 the same, 1 a difference or an error, 2 a wrong command.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
usage() { sed -n '4p' "$here/eval/official.sh" | cut -c3- >&2; exit 2; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

requirements=$here/eval/requirements-official.txt
venv=
python=
places=()
options=()
while (($#)); do
  case $1 in
    --venv) venv=$(absolute "${2:?--venv needs a folder}"); shift 2 ;;
    --requirements) requirements=$(absolute "${2:?--requirements needs a file}"); shift 2 ;;
    --python) python=$(absolute "${2:?--python needs a file}"); shift 2 ;;
    --ours | --hub | --data | --backend | --revisions | --tolerance | --tie-margin) options+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    -*) options+=("$1"); shift ;;
    *) places+=("$1"); shift ;;
  esac
done
((${#places[@]} >= 2 && ${#places[@]} <= 4)) || usage
clone=$(absolute "${places[0]%/}")
[ -d "$clone" ] || { echo "error: $clone does not exist: git clone the official pipeline there" >&2; exit 1; }

# Ours: what the rest of this repository runs in
ours=${PYTHON:-}
[ -n "$ours" ] || { [ -x "$here/.venv/bin/python" ] && ours=$here/.venv/bin/python || ours=python; }
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

run=("$ours" -m eval.official run "$clone" "${places[1]}" --backend "${places[2]:-causal}" ${options[@]+"${options[@]}"})
[ -z "${places[3]:-}" ] || run+=(--data "${places[3]}")

# Before minutes are spent on an environment: everything that can be wrong with the run, the clone and the data
"${run[@]}" --check

# ---- Theirs -----------------------------------------------------------------------------------------------------------
if [ -z "$python" ]; then
  venv=${venv:-$clone-venv}
  stamp=$venv/requirements.installed  # a copy of what was installed: written last, so that a broken installation is repeated
  if ! cmp -s "$requirements" "$stamp"; then
    found=
    for candidate in python3.12 python3.13 python3.11 python3.10 python3 python; do
      if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then found=$candidate; break; fi
    done
    [ -n "$found" ] || { echo "error: no Python from 3.10 to 3.13 found, which the pipeline's pinned versions need" >&2; exit 1; }
    echo "making the pipeline's environment in $venv with $("$found" --version) (minutes, once)"
    "$found" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
  python=$venv/bin/python
fi
exec "${run[@]}" --python "$python"
