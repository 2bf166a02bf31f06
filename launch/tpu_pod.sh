#!/usr/bin/env bash
# Runs a recipe on all hosts of a TPU slice, over SSH, and again after a preemption.
#
#   launch/tpu_pod.sh --tpu=NAME --zone=ZONE --setup      # Once: code and packages.
#   launch/tpu_pod.sh --tpu=NAME --zone=ZONE -- --config=configs/ppo.py:7b \
#     --workdir=/mnt/shared/7b                            # What launch/run.py takes.
#
# --workdir must be on a file system that all hosts have mounted (Filestore, Lustre,
# gcsfuse). See docs/launching.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh --tpu=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS OF launch/run.py]
  --project=ID   of the cloud; that of gcloud's configuration unless given
  --setup        copies this checkout to all hosts and installs it there
  --branch=NAME  of what is committed here; the one that is checked out unless given
  --retries=N    how often to start again after a preemption or a lost host (100)
  --wait=S       seconds between two looks at a slice that is not ready (60)
  --dry-run      prints the commands, and runs none
TEXT
}

tpu='' zone='' project='' setup=0 dry=0 branch='' retries=100 wait=60
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --branch=*) branch=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --setup) setup=1 ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
if [[ -z $tpu || -z $zone ]]; then
  echo "error: --tpu and --zone say where to run" >&2
  usage >&2
  exit 2
fi
at=("$tpu" "--zone=$zone")
if [[ -n $project ]]; then at+=("--project=$project"); fi

do_it() {
  if ((dry)); then printf '%q ' "$@"; echo; else "$@"; fi
}

on_all() { do_it gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all "--command=$1"; }

set_up() {
  local root archive
  root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
  archive=$(mktemp -d)/vlmrlaif_jax.tar.gz
  do_it git -C "$root" archive --format=tar.gz --output="$archive" "${branch:-HEAD}"
  do_it gcloud compute tpus tpu-vm scp "$archive" "$tpu:vlmrlaif_jax.tar.gz" \
    "${at[@]:1}" --worker=all
  on_all 'mkdir -p vlmrlaif_jax && tar -xzf vlmrlaif_jax.tar.gz -C vlmrlaif_jax && cd vlmrlaif_jax && python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
}

state() { gcloud compute tpus tpu-vm describe "${at[@]}" '--format=value(state)'; }

# Of one start: 0 if all is done, 75 if it is to be started again, else what was met.
run_once() {
  local command log codes
  command="cd vlmrlaif_jax && .venv/bin/python launch/run.py$(printf ' %q' "$@")"
  if ((dry)); then on_all "$command"; return; fi
  log=$(mktemp)
  # SSH to many hosts gives back one code, and not whose: each host prints its own.
  on_all "$command; echo \"host ended with code \$?\"" 2>&1 | tee "$log" || true
  codes=$(sed -n 's/.*host ended with code \([0-9]*\)$/\1/p' "$log" | sort -nu)
  rm -f "$log"
  if [[ $codes == 0 ]]; then return 0; fi
  # An error would be met again; all else is a lost host, SSH included.
  if grep -qx '[12]' <<<"$codes"; then return "$(grep -m1 -x '[12]' <<<"$codes")"; fi
  return 75
}

if ((setup)); then set_up; fi
if ((!$#)); then exit 0; fi
for ((try = 0; try <= retries; try++)); do
  run_once "$@" && exit 0 || code=$?
  if ((code != 75)); then exit "$code"; fi
  echo "the run ended early; it goes on from its last checkpoint (try $((try + 1)))" >&2
  until [[ $(state) == READY ]]; do
    echo "waiting for $tpu: $(state)" >&2
    sleep "$wait"
  done
done
echo "error: started $((retries + 1)) times without an end; see the hosts' output" >&2
exit 75
