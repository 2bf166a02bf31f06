#!/usr/bin/env bash
# Runs a recipe on all hosts of a TPU slice, over SSH, and again after a preemption.
#
#   launch/cluster/tpu_pod.sh --tpu=NAME --zone=ZONE --setup      # Once: code and packages.
#   launch/cluster/tpu_pod.sh --tpu=NAME --zone=ZONE -- --config=configs/ppo.py:7b \
#     --workdir=/mnt/shared/7b                            # What launch/run.py takes.
#
# --workdir must be on a file system that all hosts have mounted (Filestore, Lustre,
# gcsfuse). See docs/launching.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/cluster/tpu_pod.sh --tpu=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS OF launch/run.py]
  --project=ID   of the cloud; that of gcloud's configuration unless given
  --setup        copies this checkout to all hosts and installs it there; done without
                 it, too, before each further start
  --branch=NAME  of what is committed here; the one that is checked out unless given
  --retries=N    how often to start again after a preemption or a lost host (100)
  --wait=S       seconds between two looks at a slice that is not ready (60)
  --limit=S      seconds that a slice may take to be ready (7200)
  --type=TYPE --version=NAME
                 of the slice, as in v5litepod-16 and v2-alpha-tpuv5-lite: what is gone
                 for good, as after a preemption, is removed and made again
  --spot         makes it a Spot slice
  --dry-run      prints the commands, and runs none
TEXT
}

tpu='' zone='' project='' setup=0 dry=0 branch='' retries=100 wait=60 limit=7200
type='' version='' spot=''
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --branch=*) branch=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --limit=*) limit=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
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
if [[ -n $type && -z $version || -z $type && -n $version ]]; then
  echo "error: --type and --version together say what to make again" >&2
  exit 2
fi
here=("--zone=$zone")
if [[ -n $project ]]; then here+=("--project=$project"); fi
vm=(gcloud compute tpus tpu-vm)

do_it() {
  if ((dry)); then printf '%q ' "$@"; echo; else "$@"; fi
}

on_all() { do_it "${vm[@]}" ssh "$tpu" "${here[@]}" --worker=all "--command=$1"; }

# The code as it is now, whatever is committed while the run goes on.
archive=''
pack() {
  local root
  root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
  archive=$(mktemp -d)/vlmrlaif_jax.tar.gz
  do_it git -C "$root" archive --format=tar.gz --output="$archive" "${branch:-HEAD}"
}

# May be done again: what is there already is left, or written over with the same.
set_up() {
  do_it "${vm[@]}" scp "$archive" "$tpu:vlmrlaif_jax.tar.gz" "${here[@]}" --worker=all &&
    on_all 'mkdir -p vlmrlaif_jax && tar -xzf vlmrlaif_jax.tar.gz -C vlmrlaif_jax && cd vlmrlaif_jax && python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
}

# What gcloud says of the slice; nothing if it knows none of that name, and says so.
state() { "${vm[@]}" describe "$tpu" "${here[@]}" '--format=value(state)' || true; }

# Returns once the slice can be used; ends the script where waiting does not help.
known=0
ready() {
  local now begun=$SECONDS
  while true; do
    now=$(state)
    if [[ -n $now ]]; then known=1; fi
    case $now in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | DELETING) ;;
      PREEMPTED | TERMINATED | FAILED | '') make_again "$now" ;;
      *)
        echo "error: $tpu is $now, which waiting does not change. Where it was stopped:" \
          "${vm[*]} start $tpu ${here[*]}" >&2
        exit 75
        ;;
    esac
    if ((SECONDS - begun >= limit)); then
      echo "error: $tpu is not ready after --limit=$limit seconds" \
        "(${now:-not there}); the same command goes on" >&2
      exit 75
    fi
    echo "waiting for $tpu: ${now:-not there}" >&2
    sleep "$wait"
  done
}

make_again() {
  local make=("${vm[@]}" create "$tpu" "${here[@]}")
  make+=("--accelerator-type=${type:-TYPE}" "--version=${version:-VERSION}")
  if [[ -n $spot ]]; then make+=("$spot"); fi
  if ((!known)); then
    echo "error: gcloud knows no slice $tpu in $zone, see above. Those there are," \
      "and how to make one:" >&2
    printf '  %s\n' "${vm[*]} list ${here[*]}" "${make[*]}" >&2
    exit 2
  fi
  if [[ -z $type ]]; then
    echo "error: $tpu is ${1:-gone} and will not be ready again. Make it anew as" \
      "below, then give the same command with --setup, which goes on; or give" \
      "--type and --version, to have that done here:" >&2
    printf '  %s\n' "${vm[*]} delete $tpu ${here[*]}" "${make[*]}" >&2
    exit 75
  fi
  echo "$tpu is ${1:-gone}: made again" >&2
  if [[ -n $1 ]]; then "${vm[@]}" delete "$tpu" "${here[@]}" --quiet || return 0; fi
  # Where there is no room now there may be later.
  "${make[@]}" || true
  setup=1
}

# Of one start: 0 if all is done, 75 if it is to be started again, else what was met.
run_once() {
  local command log codes code
  command="cd vlmrlaif_jax && .venv/bin/python launch/run.py$(printf ' %q' "$@")"
  if ((dry)); then on_all "$command"; return; fi
  command="test -x vlmrlaif_jax/.venv/bin/python || { \
echo 'error: nothing is installed here: give --setup' >&2; exit 2; }; $command"
  log=$(mktemp)
  # SSH to many hosts gives back one code, and not whose: each host prints its own.
  on_all "($command); echo \"host ended with code \$?\"" 2>&1 | tee "$log" || true
  codes=$(sed -n 's/.*host ended with code \([0-9]*\)$/\1/p' "$log" | sort -nu)
  rm -f "$log"
  if [[ $codes == 0 ]]; then return 0; fi
  # Only what was stopped (75) or killed (128 + n) is worth another start, and a host
  # that SSH has lost, which says nothing. All else would be met again.
  for code in $codes; do
    if ((code != 0 && code != 75 && code <= 128)); then return "$code"; fi
  done
  return 75
}

if ((setup || $#)); then pack; fi
if ((!dry)); then ready; fi
if ((setup)); then set_up; fi
if ((!$#)); then exit 0; fi
for ((try = 0; try <= retries; try++)); do
  code=75
  # A host that was made anew has no checkout.
  if ((!try)) || set_up; then run_once "$@" && exit 0 || code=$?; fi
  if ((code != 75)); then exit "$code"; fi
  if ((try == retries)); then break; fi
  echo "the run ended early; it goes on from its last checkpoint (try $((try + 1)))" >&2
  ready
done
echo "error: started $((retries + 1)) times without an end; see the hosts' output" >&2
exit 75
