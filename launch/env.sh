# shellcheck shell=bash disable=SC2154
# What every process of a run finds in its environment. launch/torchrun.sh sources it, and sets `ranks`, the processes of this node,
# and `logs`, the folder of their output, before. A variable that is set already keeps its value: put what your site needs
# (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, module load ...) into the job, or into a file that SITE_ENV names.

if [[ -n ${SITE_ENV:-} ]]; then
  # shellcheck source=/dev/null
  source "$SITE_ENV"
fi

# Threads of each process, for what runs on CPUs: the node's cores shared out, and no more than the work is worth.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / ranks))
  ((OMP_NUM_THREADS >= 1)) || OMP_NUM_THREADS=1
  ((OMP_NUM_THREADS <= 8)) || OMP_NUM_THREADS=8
fi
export OMP_NUM_THREADS

# Lines reach the logs when they are written, and a process that dies of a signal says where it was.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED-1}
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER-1}

# A torchrun that is told to end passes the signal on, and kills workers that are not done by then; a save may take minutes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT-600}

# Processes that are started anew must not find what those before them left in the store where they meet, as they would in one that
# torchrun keeps (pytorch issue 135712): the first process has it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-1}

# When a collective times out, NCCL's flight recorder writes the last collectives of every rank beside the logs.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT-1}
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE-$logs/nccl_trace_rank_}
