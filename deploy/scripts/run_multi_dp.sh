#!/bin/sh
# Starts this host's engines of one data parallel group, each on its share of the host's devices, and ends all of them
# when one ends. What follows is set in the environment; arguments go to every `vllm serve`.
set -eu

LOCAL_IP=${LOCAL_IP:?address of this host}
NIC_NAME=${NIC_NAME:?network interface with that address}
DP_ADDRESS=${DP_ADDRESS:?address of the host with rank 0}
TP_SIZE=${TP_SIZE:-4}
DP_SIZE=${DP_SIZE:-4}                   # engines of the group, on all hosts; 1: engines on their own
DP_SIZE_LOCAL=${DP_SIZE_LOCAL:-2}       # engines on this host
DP_RANK_START=${DP_RANK_START:-0}       # rank of this host's first engine
DP_RPC_PORT=${DP_RPC_PORT:-13395}
SERVER_PORT=${SERVER_PORT:-9000}        # of the first engine; the next ones follow
DEVICES_PER_HOST=${DEVICES_PER_HOST:-8} # cores, where DEVICE=cpu
TEMPLATE=${TEMPLATE:-$(dirname "$0")/prefill.sh}
LOG_DIR=${LOG_DIR:-.}

share=$((DEVICES_PER_HOST / DP_SIZE_LOCAL))
if [ "$share" -lt 1 ]; then
    echo "run_multi_dp.sh: $DEVICES_PER_HOST devices are too few for $DP_SIZE_LOCAL engines" >&2
    exit 2
fi

pids=
stop() {
    trap '' INT TERM
    # shellcheck disable=SC2086  # a list
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
    wait
}
trap 'stop; exit 143' INT TERM

i=0
while [ "$i" -lt "$DP_SIZE_LOCAL" ]; do
    rank=$((DP_RANK_START + i))
    port=$((SERVER_PORT + i))
    devices=$(seq -s, $((i * share)) $((i * share + share - 1)))
    log=$LOG_DIR/$(basename "$TEMPLATE" .sh)_dp_$rank.log
    echo "rank $rank: port $port, devices $devices, $log"
    sh "$TEMPLATE" "$devices" "$LOCAL_IP" "$NIC_NAME" "$port" "$TP_SIZE" "$DP_SIZE" "$rank" "$DP_ADDRESS" \
        "$DP_RPC_PORT" "$@" >"$log" 2>&1 &
    pids="$pids $!"
    i=$((i + 1))
done

while :; do
    for pid in $pids; do
        if ! kill -0 "$pid" 2>/dev/null; then
            status=0
            wait "$pid" || status=$?
            echo "an engine ended with status $status: the others end too" >&2
            stop
            exit "$status"
        fi
    done
    sleep 1
done
