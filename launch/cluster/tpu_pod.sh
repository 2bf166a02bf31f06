#!/usr/bin/env bash
# Installs this checkout on all workers of a TPU slice over SSH, or runs a recipe there:
#
#   launch/cluster/tpu_pod.sh NAME ZONE setup
#   launch/cluster/tpu_pod.sh NAME ZONE run --config=configs/ppo.py:7b --workdir=/mnt/7b
#
# setup copies the committed files. --workdir is on a file system that all workers mount.
# This script restarts nothing; sky.yaml restarts preempted jobs. See docs/launching.md.
set -euo pipefail

usage() {
  echo "usage: tpu_pod.sh NAME ZONE setup | NAME ZONE run --config=FILE --workdir=DIR" >&2
  exit 2
}

if (($# < 3)); then usage; fi
name=$1 zone=$2 action=$3
shift 3

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1"
}

case $action in
  setup)
    archive=$(mktemp -d)/vlmrlaif_jax.tar.gz
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:" "--zone=$zone" --worker=all
    on_all 'mkdir -p vlmrlaif_jax && tar -xzf vlmrlaif_jax.tar.gz -C vlmrlaif_jax && cd vlmrlaif_jax && python3 -m pip install -q uv && python3 -m uv venv -q --allow-existing --python=3.11 .venv && python3 -m uv pip install -q --python=.venv -e ".[tpu]"'
    ;;
  run) on_all "cd vlmrlaif_jax && .venv/bin/python launch/run.py$(printf ' %q' "$@")" ;;
  *) usage ;;
esac
