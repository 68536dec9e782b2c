#!/usr/bin/env bash
# Trains with several processes under Open MPI:
#
#   scripts/launch/mpirun.sh 4 --config=digits --workdir=runs/four
#   HOSTFILE=hosts scripts/launch/mpirun.sh 64 --config=imagenet_resnet50 --workdir=/shared/run
#
# The first argument counts processes, the others are experiments/train.py's. JAX finds the other processes by itself. All
# need the same files and the same work folder. PYTHON names another interpreter than .venv's.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the first argument counts processes: scripts/launch/mpirun.sh 4 --config=..." >&2
  exit 2
fi
processes=$1
shift
exec mpirun -np "$processes" ${HOSTFILE:+--hostfile "$HOSTFILE" --map-by node} --oversubscribe --bind-to none \
  "${PYTHON:-.venv/bin/python}" experiments/train.py "$@"
