# Shared by the launch scripts: options, where the repository is, and --dry-run. Sourced, not run.
#
#   SCRIPT [--dry-run] [--gpus N] [script's own options] CONFIG.yaml [flags of train.py ...]
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
TRAIN="$ROOT/experiments/train.py"
PYTHON="${PYTHON:-python}"
DRY_RUN=0
GPUS="${GPUS:-}"

die() { echo "error: $*" >&2; exit 2; }

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit "${1:-0}"; }

# Takes --dry-run, --gpus N and --help out of the arguments; the script's own options are in OWN ("--nodes --node_rank").
# What follows them goes into ARGS.
parse() {
  ARGS=()
  while (($#)); do
    case "$1" in
      --dry-run) DRY_RUN=1 ;;
      --gpus) need "$@"; GPUS="$2"; shift ;;
      -h | --help) usage ;;
      *)
        if [[ " ${OWN:-} " == *" $1 "* ]]; then
          need "$@"
          printf -v "$(tr 'a-z-' 'A-Z_' <<<"${1#--}")" '%s' "$2"
          shift
        else
          ARGS+=("$@")
          break
        fi ;;
    esac
    shift
  done
  ((${#ARGS[@]})) || usage 2
  if [[ -z "$GPUS" ]]; then
    GPUS="$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)"
    ((GPUS)) || die "no GPU is listed by nvidia-smi; say how many processes with --gpus N"
  fi
  [[ "$GPUS" =~ ^[1-9][0-9]*$ ]] || die "--gpus must be a number of at least 1; got $GPUS"
}

need() { (($# > 1)) || die "$1 needs a value"; }

# Runs a command in the repository, or prints it so that a shell can read it back.
start() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    printf '\n'
  else
    cd "$ROOT"
    exec "$@"
  fi
}
