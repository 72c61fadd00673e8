#!/usr/bin/env bash
# Trains on one node or many. Arguments are those of training (python -m megatron_mamba.train --help):
#   ./launch/torchrun.sh model=hybrid_8b data.path=PREFIX trainer.train_samples=100000 run.dir=runs/a
# On many nodes, the same on each of them, with the name of one in HEAD (launch/slurm/pretrain.sbatch does so):
#   NNODES=4 HEAD=node01 ./launch/torchrun.sh ...
#
# Settings, from the environment:
#   NPROC_PER_NODE  processes of this node (default: its GPUs, or 1 without any)
#   NNODES          nodes (1)
#   HEAD            host where they meet, one of the nodes (needed if there are several)
#   NODE_RANK       0 on HEAD and another number elsewhere (default: each node compares HEAD with its own names)
#   PORT            port there (29500; on one node any free one)
#   RUN_ID          what the nodes of one run have in common (default: the port)
#   MAX_RESTARTS    how often all processes are started anew, from the last checkpoint, after one failed (0)
#   LOG_DIR         folder of what each process writes (default: logs, in run.dir where that is an argument); the console shows the
#                   first process of each node
#   STUCK_SECONDS   how long torchrun may wait for HEAD after the processes here have ended, before it is killed (60)
#   FINISHED_FILE   a file that the first process makes if the run has nothing left to do: it was not stopped before its end (none)
#   PYTHON          the interpreter (.venv's if there is one, else python3)
#   SITE_ENV        a file to source first; see launch/env.sh for what is set besides
#
# SIGTERM or SIGUSR1 to this script: the processes write a checkpoint and end, and so does it, with exit code 0. The same command
# continues from there.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf 'torchrun.sh: %s\n' "$@" >&2
  exit 2
}

positive() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a positive number"
}

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -n ${VIRTUAL_ENV:-} || ! -x $repository/.venv/bin/python ]] || python=$repository/.venv/bin/python
fi
"$python" -c 'import importlib.util as i, sys; sys.exit(not (i.find_spec("torch") and i.find_spec("megatron_mamba")))' 2>/dev/null ||
  fail "$python has no torch or no megatron_mamba" "Run ./launch/setup.sh, or set PYTHON=/path/to/python"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 403)) || fail "bash $BASH_VERSION is too old" "Use 4.3 or newer"
NNODES=${NNODES:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
MAX_RESTARTS=${MAX_RESTARTS:-0}
PORT=${PORT:-29500}
STUCK_SECONDS=${STUCK_SECONDS:-60}
positive NNODES
positive NPROC_PER_NODE
positive PORT
positive STUCK_SECONDS
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a number"

ranks=$NPROC_PER_NODE
meet=(--rdzv-backend=c10d --rdzv-id="${RUN_ID:-$PORT}")
if ((NNODES == 1)); then
  meet+=(--rdzv-endpoint=localhost:0)
else
  [[ -n ${HEAD:-} ]] || fail "NNODES=$NNODES needs HEAD=HOST, the name of one of the nodes, the same on all"
  meet+=(--rdzv-endpoint="$HEAD:$PORT")
  [[ -z ${NODE_RANK:-} ]] || meet+=(--rdzv-conf="is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)")
fi

# What the settings make of run.dir, with quotes, ${run.name} and --config; a mistake in them ends all of this here.
if [[ -z ${LOG_DIR:-} ]]; then
  LOG_DIR=$("$python" -c 'import sys; from megatron_mamba.train.__main__ import log_folder; log_folder(sys.argv[1:])' "$@") || exit
fi
logs=$LOG_DIR
mkdir -p "$logs"
# shellcheck source=launch/env.sh
source "$repository/launch/env.sh"

# SIGUSR1 is for the training processes, which take it from when they are set up until they end. torchrun would die of it, as would
# they before and after: SLURM sends it to every process.
(
  trap '' USR1
  exec "$python" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" "${meet[@]}" \
    --max-restarts="$MAX_RESTARTS" --log-dir="$logs" --tee=3 --local-ranks-filter=0 \
    -m megatron_mamba.train "$@"
) &
agent=$!

children() {
  # Kernels built without the former have procps as a rule.
  cat "/proc/$agent/task/"*/children 2>/dev/null || pgrep -P "$agent" || true
}

# Again and again, for those that were not set up yet or have been started anew since.
told=
stop() {
  local processes
  told=1
  read -r -d '' -a processes < <(children) || true
  ((${#processes[@]} == 0)) || kill -USR1 "${processes[@]}" 2>/dev/null || true
}
trap stop USR1 TERM
trap 'kill -INT "$agent" 2>/dev/null || true' INT

# Whether torchrun waits without end for an answer of HEAD: it has not even noticed that all its processes have ended, or it wants to
# start them anew.
started=
stuck() {
  local process processes
  read -r -d '' -a processes < <(children) || true
  if ((${#processes[@]} == 0)); then
    [[ -n $started && -n ${HEAD:-} ]] && ! timeout 2 bash -c "exec 3<>'/dev/tcp/$HEAD/$PORT'" 2>/dev/null
    return
  fi
  for process in "${processes[@]}"; do
    grep -qs '^State:.Z' "/proc/$process/status" || { started=1 && return 1; }
  done
}

alive=$SECONDS
while kill -0 "$agent" 2>/dev/null; do
  sleep 2 >/dev/null 2>&1 &
  wait -n "$agent" $! || true
  [[ -z $told ]] || stop
  stuck || alive=$SECONDS
  if ((SECONDS - alive > STUCK_SECONDS)); then
    echo "torchrun.sh: the processes of this node have ended (see $logs), and ${HEAD:-localhost} cannot be reached" >&2
    kill -KILL "$agent" 2>/dev/null || true
  fi
done
wait "$agent"
