#!/usr/bin/env bash
# Several hosts with torchrun: run the same command on each, within ten minutes, in any order.
#
#     NODES=4 HEAD=node0 launch/nodes.sh CONFIG [KEY=VALUE …]
#
# HEAD is the name or address of one of the hosts, reachable from all; the hosts meet there.
# If a host is lost, all processes stop. When it, or a replacement, runs this command again, all resume from the last
# checkpoint, up to RESTARTS times (default: 10). If HEAD is lost, the command ends on all hosts: run it again on each.
set -euo pipefail

# Otherwise restarted processes read the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
PYTHON=${PYTHON:-python}
: "${NODES:?set it to the number of hosts, e.g. NODES=4}" "${HEAD:?set it to the host where they meet, e.g. HEAD=node0}"
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi

exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${JOB:-mmrl}" \
    --rdzv-conf "join_timeout=${JOIN_SECONDS:-600},last_call_timeout=5" \
    --max-restarts "${RESTARTS:-10}" --monitor-interval 1 --shutdown-timeout 280 -m mmrl.cli train "$@" resume=auto
