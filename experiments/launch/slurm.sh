#!/usr/bin/env bash
# SLURM: submits a job that runs torchrun once on every machine and is put back into the queue when one fails.
#
#   experiments/launch/slurm.sh --nodes 2 [--time 24:00:00] [--partition NAME] [--dry-run] --gpus 8
#       CONFIG.yaml [flags of train.py ...]
#
# --dry-run prints the batch script. The job resumes from its last whole checkpoint by itself.
set -euo pipefail
source "$(dirname "$0")/common.sh"
NODES="" TIME=24:00:00 PARTITION=""
OWN="--nodes --time --partition"
parse "$@"
[[ -n "$NODES" ]] || die "--nodes is missing"
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
srun --kill-on-bad-exit=1 $PYTHON -m torch.distributed.run --nnodes $NODES --nproc_per_node $GPUS \\
  --rdzv_backend c10d --rdzv_endpoint "\$head:\$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id "\$SLURM_JOB_ID" \\
  $(printf '%q ' "$TRAIN" "${ARGS[@]}")--resume_from_checkpoint true \\
  || scontrol requeue "\$SLURM_JOB_ID"
SCRIPT
)"
if ((DRY_RUN)); then
  echo "$batch"
else
  sbatch <<<"$batch"
fi
