#!/usr/bin/env bash
# Several machines by torchrun: the same line on each of them, within ten minutes, in any order.
#
#     NODES=4 HEAD=node0 launch/nodes.sh CONFIG [KEY=VALUE …]
#
# HEAD is one of the machines, by a name or address that all reach; the others find each other there.
# A machine that is lost stops all; as soon as it, or another in its place, runs this line again, all go on from the
# last checkpoint, RESTARTS times. Where HEAD itself is lost the line ends everywhere: start it again on each machine.
set -euo pipefail

# Without it restarted processes read the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
PYTHON=${PYTHON:-python}
: "${NODES:?how many machines, such as NODES=4}" "${HEAD:?the machine at which they meet, such as HEAD=node0}"
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi

exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${JOB:-mmrl}" \
    --rdzv-conf "join_timeout=${JOIN_SECONDS:-600},last_call_timeout=5" \
    --max-restarts "${RESTARTS:-10}" --monitor-interval 1 --shutdown-timeout 280 -m mmrl.cli train "$@" resume=auto
