# Read by prefill.sh and decode.sh, which set $name and $kv_transfer_config. What the engine is called with, and why:
# docs/deployment.md.
# shellcheck shell=sh disable=SC2154

fail() {
    echo "$name: $*" >&2
    echo "usage: DEVICE=cuda|ascend|cpu MODEL=NAME KVPOOL_MASTER=HOST:PORT $name DEVICES LOCAL_IP NIC_NAME SERVER_PORT" \
        "TP_SIZE DP_SIZE DP_RANK DP_ADDRESS DP_RPC_PORT [arguments of vllm serve]" >&2
    exit 2
}

[ $# -ge 9 ] || fail "nine arguments are needed, not $#"
devices=$1 local_ip=$2 nic_name=$3 server_port=$4 tp_size=$5 dp_size=$6 dp_rank=$7 dp_address=$8 dp_rpc_port=$9
shift 9
case ${1:-} in
[0-9]*) shift ;; # the port of a transfer connector, which old callers give here: this one opens none
esac
[ -n "${MODEL:-}" ] || fail "MODEL is not set"
[ -n "${KVPOOL_MASTER:-}" ] || fail "KVPOOL_MASTER is not set"
export KVPOOL_MASTER KVPOOL_ENGINE_ADDRESS="$local_ip:$server_port" # where kvpool-proxy finds it, through the master
export GLOO_SOCKET_IFNAME="$nic_name" VLLM_HOST_IP="$local_ip"

case ${DEVICE:-cuda} in
cuda)
    export CUDA_VISIBLE_DEVICES="$devices" NCCL_SOCKET_IFNAME="$nic_name"
    ;;
ascend)
    export ASCEND_RT_VISIBLE_DEVICES="$devices"
    export HCCL_IF_IP="$local_ip" HCCL_SOCKET_IFNAME="$nic_name" TP_SOCKET_IFNAME="$nic_name" HCCL_BUFFSIZE=256
    export OMP_PROC_BIND=false OMP_NUM_THREADS=10
    export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True TASK_QUEUE_ENABLE=1
    ;;
cpu)
    # Cores instead of devices: an equal share for each rank, "0,1|2,3".
    VLLM_CPU_OMP_THREADS_BIND=$(awk -v list="$devices" -v ranks="$tp_size" 'BEGIN {
        n = split(list, core, ",")
        if (ranks < 1 || n % ranks) exit 1
        for (i = 1; i <= n; i++) printf "%s%s", core[i], i == n ? "" : i % (n / ranks) ? "," : "|"
    }') || fail "$devices are no equal shares for $tp_size ranks"
    export VLLM_CPU_OMP_THREADS_BIND
    ;;
*)
    fail "DEVICE must be cuda, ascend or cpu, not $DEVICE"
    ;;
esac

if [ "$dp_size" -gt 1 ]; then
    set -- --data-parallel-size "$dp_size" --data-parallel-rank "$dp_rank" \
        --data-parallel-address "$dp_address" --data-parallel-rpc-port "$dp_rpc_port" "$@"
fi
exec vllm serve "$MODEL" --host 0.0.0.0 --port "$server_port" --tensor-parallel-size "$tp_size" --seed 1024 \
    --kv-transfer-config "$kv_transfer_config" "$@"
