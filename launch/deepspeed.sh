#!/usr/bin/env bash
# Several hosts with DeepSpeed's launcher, started on one of them; needs pdsh, and ssh without a password.
#
#     HOSTFILE=hostfile launch/deepspeed.sh CONFIG [KEY=VALUE …]
#
# Each line of the hostfile names a host and its number of GPUs: `node0 slots=8`. Environment variables for the hosts
# (NCCL_SOCKET_IFNAME, OMP_NUM_THREADS, …) go into ./.deepspeed_env, one NAME=VALUE per line.
# If a host is lost, the others stop, and all restart from the last checkpoint, up to RESTARTS times (default: 3).
set -euo pipefail

PYTHON=${PYTHON:-python}
: "${HOSTFILE:?set it to a file with lines like: node0 slots=8}"
HEAD=${HEAD:-$(awk '!/^ *(#|$)/ {print $1; exit}' "$HOSTFILE")}
# Without a timeout, pdsh waits forever for the connection to a lost host.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"

for ((try = 0; ; try++)); do
    code=0
    "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "$HEAD" --master_port "${PORT:-29511}" \
        --force_multi --no_local_rank --module mmrl.cli train "$@" resume=auto || code=$?
    # Exit code 2 is invalid input, which a retry does not fix.
    if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$try" -ge "${RESTARTS:-3}" ]; then
        exit "$code"
    fi
    echo "launch/deepspeed.sh: the run ended with exit code $code; restarting in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}"
done
