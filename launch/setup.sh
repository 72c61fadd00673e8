#!/usr/bin/env bash
# Makes .venv and installs the project in it, in editable form, with the extras of pyproject.toml that are named:
#   ./launch/setup.sh [EXTRAS, default export] && source .venv/bin/activate
# A second run takes no time unless pyproject.toml changed. PYTHON=/path/to/python3 chooses the interpreter of a new .venv;
# an active virtual environment is not used. On a GPU machine a CUDA build of PyTorch is installed, or the system's own is used if it
# is new enough; otherwise the CPU build. TORCH='torch==2.11.0 --index-url URL' chooses another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1-export}
venv=.venv
log=$venv/setup.log
cpu_torch=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
step=0
python=

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

# run TITLE COMMAND...: one line for the step; on a terminal with a clock and the command's latest line of output.
run() {
  local title=$1 start=$SECONDS pid
  shift
  step=$((step + 1))
  printf '[setup %d/3] %s ...' "$step" "$title"
  set -m # a process group of its own, which an interrupt ends as a whole
  "$@" >>"$log" 2>&1 &
  pid=$!
  set +m
  trap 'kill -- "-$pid" 2>/dev/null; printf "\n"; fail "interrupted; run it again to go on"' INT TERM
  while [[ -t 1 ]] && kill -0 "$pid" 2>/dev/null; do
    printf '\r\033[K[setup %d/3] %s ... %d s \033[2m%s\033[0m' "$step" "$title" $((SECONDS - start)) \
      "$(tail -n 1 "$log" | tr -dc '[:print:]' | cut -c 1-50)"
    sleep 0.5
  done
  if ! wait "$pid"; then
    printf ' failed\n'
    tail -n 20 "$log" >&2
    fail "'$title' failed; the whole output is in $log"
  fi
  [[ -t 1 ]] && printf '\r\033[K[setup %d/3] %s ...' "$step" "$title"
  trap - INT TERM
  printf ' done (%d s)\n' $((SECONDS - start))
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      return
    fi
  done
  fail "Python 3.11 or newer is needed; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo missing)" \
    "Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON=/path/to/python3."
}

# has_torch INTERPRETER cpu|gpu: is torch >= 2.11 there (for gpu: a CUDA build)?
has_torch() {
  "$1" - "$2" <<'PY' 2>/dev/null
import sys
import torch
new = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 11)
sys.exit(not (new and (sys.argv[1] == "cpu" or torch.version.cuda)))
PY
}

# With the extra dev, that of a machine for tests, Python compiles what it imports when it does, and not all that is installed.
pip_install() {
  local options=(--disable-pip-version-check --progress-bar off)
  [[ $extras != *dev* ]] || options+=(--no-compile)
  "$venv/bin/python" -m pip install "${options[@]}" "$@"
}

reachable() { "$venv/bin/python" -c "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)" "$1" 2>/dev/null; }

make_venv() {
  [[ -x $venv/bin/python ]] && return # never over another interpreter's environment
  local options=()
  [[ $device == gpu ]] && has_torch "$python" gpu && options=(--system-site-packages)
  "$python" -m venv "${options[@]}" "$venv"
}

install_torch() {
  if [[ -n ${TORCH-} ]]; then
    # shellcheck disable=SC2086 # several arguments
    pip_install $TORCH
  elif has_torch "$venv/bin/python" "$device"; then
    echo "torch is there already"
  elif [[ $device == gpu ]]; then
    pip_install "torch>=2.11"
  elif [[ $(uname -s) == Linux ]] && reachable "$cpu_index/torch/"; then
    pip_install "torch==$cpu_torch" --index-url "$cpu_index"
  else
    pip_install "torch==$cpu_torch"
  fi
}

# A torch for a newer CUDA than the driver knows installs without a word and then sees no GPU.
check_driver() {
  "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && return
  local driver built
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  built=$("$venv/bin/python" -c 'import torch; print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda},")')
  fail "$built sees no GPU: the driver here, ${driver:-of unknown version}, may be too old for it" \
    "Update the driver, or take a build for an older CUDA (https://pytorch.org/get-started/locally lists them):" \
    "TORCH='torch>=2.11 --index-url https://download.pytorch.org/whl/cu126' ./launch/setup.sh $extras"
}

# The pin keeps pip from replacing the torch that is there while it resolves the other packages. It is what the metadata call the
# version: those of wheels from PyPI lack the "+cu132" that torch.__version__ has.
install_project() {
  "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$venv/constraints.txt"
  pip_install -c "$venv/constraints.txt" -e ".${extras:+[$extras]}"
}

key=$(cat pyproject.toml launch/setup.sh | cksum)
stamp=$venv/.installed-${extras//,/-}
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$key" ]]; then
  echo "[setup] $venv is up to date"
  exit 0
fi

device=cpu
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && device=gpu
"$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  find_python
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module" \
    "Install it (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON=/path/to/another/python3."
  rm -rf "$venv"
}
mkdir -p "$venv"
: >"$log"
run "Python environment $venv${python:+ ($("$python" --version))}" make_venv
run "PyTorch for $device" install_torch
[[ $device == cpu ]] || check_driver
run "megatron-mamba${extras:+ with $extras}" install_project
printf '%s\n' "$key" >"$stamp"
