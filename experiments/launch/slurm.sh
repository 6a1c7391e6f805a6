#!/usr/bin/env bash
# SLURM: submits a job that runs torchrun once on every machine and is put back into the queue when one fails.
#
#   experiments/launch/slurm.sh --nodes 2 [--time 24:00:00] [--partition NAME] [--requeues 10] [--dry-run] --gpus 8
#       CONFIG.yaml [flags of train.py ...]
#
# --dry-run prints the batch script. The job resumes from its last whole checkpoint by itself. It comes back at most
# --requeues times, or a wrong flag would keep it coming back for ever.
set -euo pipefail
source "$(dirname "$0")/common.sh"
NODES="" TIME=24:00:00 PARTITION="" REQUEUES=10
OWN="--nodes --time --partition --requeues"
parse "$@"
[[ -n "$NODES" ]] || die "--nodes is missing"
[[ "$NODES" =~ ^[1-9][0-9]*$ ]] || die "--nodes must be a number of at least 1; got $NODES"
[[ "$REQUEUES" =~ ^[0-9]+$ ]] || die "--requeues must be a number; got $REQUEUES"
batch="$(
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=sar
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$GPUS
#SBATCH --time=$TIME
#SBATCH --requeue
#SBATCH --open-mode=append
${PARTITION:+#SBATCH --partition=$PARTITION}
cd $(printf '%q' "$ROOT")
head=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 $(printf '%q' "$PYTHON") -m torch.distributed.run --nnodes $NODES --nproc_per_node $GPUS \\
  --rdzv_backend c10d --rdzv_endpoint "\$head:\$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id "\$SLURM_JOB_ID" \\
  $(printf '%q ' "$TRAIN" "${ARGS[@]}")--resume_from_checkpoint true \\
  || {
    code=\$?
    ((\${SLURM_RESTART_COUNT:-0} < $REQUEUES)) && scontrol requeue "\$SLURM_JOB_ID"
    exit \$code
  }
SCRIPT
)"
if ((DRY_RUN)); then
  echo "$batch"
else
  sbatch <<<"$batch"
fi
