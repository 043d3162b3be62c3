#!/usr/bin/env bash
# Several machines by DeepSpeed's launcher, from one of them, over ssh without a password (needs pdsh).
#
#     HOSTFILE=hostfile launch/deepspeed.sh CONFIG [KEY=VALUE …]
#
# A line of the hostfile is a machine and its number of GPUs: `node0 slots=8`. Variables that the machines need
# (NCCL_SOCKET_IFNAME, OMP_NUM_THREADS …) stand in ./.deepspeed_env, NAME=VALUE a line.
# Where a machine is lost the others stop, and all are started again from the last checkpoint, RESTARTS times.
set -euo pipefail

PYTHON=${PYTHON:-python}
: "${HOSTFILE:?a file with lines such as: node0 slots=8}"
HEAD=${HEAD:-$(awk '!/^ *(#|$)/ {print $1; exit}' "$HOSTFILE")}
# A connection to a machine that is gone must end, or pdsh waits for it for ever.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"

for ((try = 0; ; try++)); do
    code=0
    "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "$HEAD" --master_port "${PORT:-29511}" \
        --force_multi --no_local_rank --module mmrl.cli train "$@" resume=auto || code=$?
    # 2 is a mistake in the command or the config, which trying again does not mend.
    if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$try" -ge "${RESTARTS:-3}" ]; then
        exit "$code"
    fi
    echo "launch/deepspeed.sh: the run ended with $code; starting again in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}"
done
