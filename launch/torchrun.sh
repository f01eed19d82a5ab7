#!/usr/bin/env bash
# One node of an elastic job, under stock torchrun. On each node, at any time, with the same endpoint and id:
#   ENDPOINT=first-host:29400 JOB=my-job launch/torchrun.sh configs/elastic-quickstart.yaml [key=value …]
set -eu
exec torchrun --rdzv-backend=lsopt --rdzv-endpoint="${ENDPOINT:?host:port of the first node}" \
  --rdzv-id="${JOB:?a name of the job, the same on all nodes}" --nnodes="${NODES:-1:64}" --nproc-per-node=1 \
  --max-restarts="${MAX_RESTARTS:-3}" -m elastic_lsopt.agent "$@"
