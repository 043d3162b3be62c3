#!/usr/bin/env bash
# One host, one process per GPU.
#
#     launch/one_node.sh CONFIG [KEY=VALUE …]
#     PROCESSES=2 launch/one_node.sh CONFIG        without GPUs, or with fewer processes than GPUs
#
# If a process dies, all processes restart from the last checkpoint, up to RESTARTS times (default: 3).
set -euo pipefail

# Otherwise restarted processes read the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
PYTHON=${PYTHON:-python}
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
    --max-restarts "${RESTARTS:-3}" --monitor-interval 1 --shutdown-timeout 280 -m mmrl.cli train "$@" resume=auto
