#!/usr/bin/env bash
# The first nodes of an elastic job, one agent each, by DeepSpeed's launcher (ssh to the hosts of the file):
#   launch/deepspeed.sh launch/hostfile configs/elastic-quickstart.yaml [key=value …]
# Without a GPU: DS_ACCELERATOR=cpu. Nodes may join later by launch/torchrun.sh with the same endpoint.
set -eu
hosts="${1:?a hostfile, as launch/hostfile}"
shift
exec deepspeed --hostfile "$hosts" --num_accelerators 1 --no_local_rank --master_port "${PORT:-29400}" \
  --launcher "${LAUNCHER:-pdsh}" --module elastic_lsopt.agent "$@"
