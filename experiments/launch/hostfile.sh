#!/usr/bin/env bash
# Several machines by the DeepSpeed launcher, from one of them; the others are reached by ssh (pdsh).
#
#   experiments/launch/hostfile.sh --hostfile HOSTS [--dry-run] [--gpus N] CONFIG.yaml [flags of train.py ...]
#
# HOSTS has a line "name slots=8" for every machine. Without ssh between them run it on each machine with
# --node_rank R --head HOST. Variables that the other machines need go into .deepspeed_env, one NAME=value a line.
set -euo pipefail
source "$(dirname "$0")/common.sh"
HOSTFILE="" NODE_RANK="" HEAD="" PORT=29500
OWN="--hostfile --node_rank --head --port"
parse "$@"
[[ -n "$HOSTFILE" ]] || die "--hostfile is missing"
[[ -f "$HOSTFILE" ]] || die "--hostfile $HOSTFILE does not exist"
grep -qE '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$HOSTFILE" || die "--hostfile $HOSTFILE has no line 'name slots=N'"
own=()
if [[ -n "$NODE_RANK" ]]; then
  [[ -n "$HEAD" ]] || die "--node_rank needs --head"
  own=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$HEAD")
fi
start deepspeed --hostfile "$HOSTFILE" --num_gpus "$GPUS" --master_port "$PORT" "${own[@]}" "$TRAIN" "${ARGS[@]}"
