#!/usr/bin/env bash
# Several machines by torchrun: run it on each. The rendezvous survives a restart, so a machine that died may come back;
# with --resume_from_checkpoint true the job goes on from the last whole checkpoint.
#
#   experiments/launch/torchrun.sh --nodes 2 --node_rank 0 --head HOST [--port 29500] [--address OWN] [--restarts 3]
#       [--dry-run] [--gpus N] CONFIG.yaml --resume_from_checkpoint true [flags of train.py ...]
#
# --head is the name or address of the machine with --node_rank 0. --address is this machine's own, where its host name
# does not lead the others to it. Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where a machine has several networks.
set -euo pipefail
source "$(dirname "$0")/common.sh"
NODES="" NODE_RANK="" HEAD="" PORT=29500 ADDRESS="" RESTARTS=0
OWN="--nodes --node_rank --head --port --address --restarts"
parse "$@"
for name in NODES NODE_RANK HEAD; do
  [[ -n "${!name}" ]] || die "--$(tr 'A-Z' 'a-z' <<<"$name") is missing"
done
is_host=$([[ "$NODE_RANK" == 0 ]] && echo 1 || echo 0)
start "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${JOB_ID:-sar}" --rdzv_conf "is_host=$is_host" \
  ${ADDRESS:+--local_addr "$ADDRESS"} --max_restarts "$RESTARTS" "$TRAIN" "${ARGS[@]}"
