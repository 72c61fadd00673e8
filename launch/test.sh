#!/usr/bin/env bash
# Installs into .venv what is missing, then lints, checks types and runs the tests. Arguments go to pytest:
#   ./launch/test.sh tests/unit -k config
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
./launch/setup.sh export,dev || exit

bin=.venv/bin
workers=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=1 # one thread a worker: more would only fight for the same cores
summary=()
failed=0

check() {
  local name=$1 start=$SECONDS outcome=passed
  shift
  printf '\n== %s\n' "$name"
  "$@" || { outcome=FAILED failed=1; }
  summary+=("$(printf '%-6s %s (%d s)' "$name" "$outcome" $((SECONDS - start)))")
}

check ruff "$bin/ruff" check .
check mypy "$bin/mypy"
check pytest "$bin/python" -m pytest -n "$workers" --dist loadgroup "$@"

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
