#!/usr/bin/env bash
# One machine, one process a GPU.
#
#     launch/one_node.sh CONFIG [KEY=VALUE …]
#     PROCESSES=2 launch/one_node.sh CONFIG        on a machine without GPUs, or with fewer processes
#
# A process that dies takes the others with it, and all go on from the last checkpoint, RESTARTS times.
set -euo pipefail

# Without it restarted processes read the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
PYTHON=${PYTHON:-python}
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
    --max-restarts "${RESTARTS:-3}" --monitor-interval 1 --shutdown-timeout 280 -m mmrl.cli train "$@" resume=auto
