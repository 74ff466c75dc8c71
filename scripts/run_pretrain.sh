#!/usr/bin/env bash
# Train a config with several processes: scripts/run_pretrain.sh CONFIG NPROC [KEY=VALUE]...
#
# One machine:       scripts/run_pretrain.sh configs/pretrain_wikipedia.yaml 8
# Several machines:  NNODES=2 RDZV=host0:29500 scripts/run_pretrain.sh configs/pretrain_v1.yaml 8     (on each of them)
#
# Run it again and it goes on from the last checkpoint, also with another number of processes. Ctrl-C and SIGTERM are
# handed to the training processes, which finish their step, save and end (exit code 130); torchrun itself would kill
# them after 30 seconds.
set -euo pipefail

if [[ $# -lt 2 || ! -f ${1:-} || ! ${2:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: scripts/run_pretrain.sh CONFIG NPROC [KEY=VALUE]...   (CONFIG: a YAML file, NPROC: processes per machine)" >&2
    exit 2
fi
config=$1 processes=$2
shift 2

if [[ ${NNODES:-1} -gt 1 ]]; then
    : "${RDZV:?several machines meet at RDZV=HOST:PORT, where HOST is one of them}"
    meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-fusiontree}")
else
    meeting=(--standalone)
fi

# Left to themselves, the processes of a machine would each use all of its cores.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi

# In a session of its own, so that Ctrl-C reaches this script alone.
setsid "${PYTHON:-python}" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" \
    -m fusiontree train "$config" "$@" &
launcher=$!
stopped=
stop() {
    stopped=yes
    pkill -TERM -P "$launcher" || true
}
trap stop INT TERM
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait: the processes are still saving
    status=0
    wait "$launcher" || status=$?
done
if [[ -n $stopped && $status -eq 0 ]]; then
    exit 130
fi
exit "$status"
