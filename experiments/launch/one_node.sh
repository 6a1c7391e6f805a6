#!/usr/bin/env bash
# One machine, all its GPUs, by torchrun. DeepSpeed is what the configuration's `deepspeed:` says.
#
#   experiments/launch/one_node.sh [--dry-run] [--gpus N] CONFIG.yaml [flags of train.py ...]
#
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse "$@"
start "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$TRAIN" "${ARGS[@]}"
