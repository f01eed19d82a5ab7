#!/usr/bin/env bash
# The first nodes of an elastic job, one agent each, by Open MPI; mpi4py tells all the first node's address:
#   HOSTS=node-1:1,node-2:1 launch/mpirun.sh configs/elastic-quickstart.yaml [key=value …]
# MPI is over before training begins, so a node that dies takes no other with it, and nodes may join later.
set -eu
exec mpirun --host "${HOSTS:?host:1,host:1,… }" --map-by node --prtemca prte_abort_on_non_zero_status 0 \
  python -m elastic_lsopt.agent "$@"
