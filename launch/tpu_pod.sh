#!/usr/bin/env bash
# Trains on a TPU slice, started from here:
#   launch/tpu_pod.sh NAME ZONE TYPE --config configs/qwen_jsonl.py \
#       --config.model.path=MODEL --config.checkpoint.folder=gs://BUCKET/RUN [...]
# Makes the queued resource NAME of a TYPE such as v5litepod-64, or uses the one there is; copies the
# committed code to all its hosts, installs it, runs it on all and follows the log. After a preemption
# all that is done again, and the run goes on from its checkpoint in the bucket. Ctrl-C ends the
# following alone. To give the slice back:
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
# In the environment: RUNTIME, the VMs' image; SPOT=1 for a slice that may be taken away.
set -eu
if (($# < 4)); then
  sed -n '2,11s/^# //p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
case $type in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  *) image=tpu-ubuntu2204-base ;;
esac
RUNTIME=${RUNTIME:-$image}

say() { echo "tpu_pod: $*" >&2; }
queued() { gcloud compute tpus queued-resources "$1" "$name" --zone "$zone" "${@:2}"; }
state() { queued describe --format 'value(state.state)' 2>/dev/null || true; }
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

# Returns when the slice can be used.
acquire() {
  local now before=
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || say "$name is ${now:-not there}"
    before=$now
    case $now in
      ACTIVE) return ;;
      '')
        queued create --node-id "$name" --accelerator-type "$type" --runtime-version "$RUNTIME" \
          ${SPOT:+--spot}
        ;;
      SUSPENDED | SUSPENDING | FAILED) queued delete --force --quiet ;;
    esac
    sleep 20
  done
}

code=$(mktemp)
trap 'rm -f "$code"' EXIT
git -C "$(dirname "$0")/.." archive --format tar.gz --output "$code" HEAD
printf -v arguments '%q ' "$@"
while :; do
  acquire
  say "copying the code to all hosts"
  if gcloud compute tpus tpu-vm scp "$code" "$name:grpo_jax.tar.gz" --zone "$zone" --worker all &&
    on_all 'rm -rf grpo_jax && mkdir grpo_jax && tar -xzf grpo_jax.tar.gz -C grpo_jax &&
      python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --clear --python 3.12 venv &&
      ~/.local/bin/uv pip install --quiet --python venv -e "grpo_jax[tpu,gcs]"' &&
    on_all "cd grpo_jax && PYTHONUNBUFFERED=1 ../venv/bin/python -m grpo_jax.train $arguments"; then
    exit 0
  fi
  # The hosts are gone a while before the queued resource says so.
  sleep 60
  if [[ $(state) == ACTIVE ]]; then
    say "the run failed, and $name is still there: see the log above"
    exit 1
  fi
  say "$name was taken away; starting again"
done
