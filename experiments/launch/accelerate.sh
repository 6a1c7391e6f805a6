#!/usr/bin/env bash
# One or several machines by `accelerate launch`.
#
#   experiments/launch/accelerate.sh [--nodes 1 --node_rank 0 --head HOST] [--port 29500]
#       [--dry-run] [--gpus N] CONFIG.yaml [flags of train.py ...]
#
set -euo pipefail
source "$(dirname "$0")/common.sh"
NODES=1 NODE_RANK=0 HEAD=127.0.0.1 PORT=29500
OWN="--nodes --node_rank --head --port"
parse "$@"
start accelerate launch --num_machines "$NODES" --machine_rank "$NODE_RANK" --main_process_ip "$HEAD" \
  --main_process_port "$PORT" --num_processes $((NODES * GPUS)) --mixed_precision no --dynamo_backend no \
  $( ((NODES * GPUS > 1)) && echo --multi_gpu || true) "$TRAIN" "${ARGS[@]}"
