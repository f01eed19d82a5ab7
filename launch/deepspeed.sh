#!/usr/bin/env bash
# The first nodes of an elastic job, one agent each, by DeepSpeed's launcher (ssh to the hosts of the file):
#   launch/deepspeed.sh launch/hostfile configs/elastic-quickstart.yaml [key=value …]
# Without a GPU: DS_ACCELERATOR=cpu. Nodes may join later by launch/torchrun.sh with the same endpoint.
set -eu
hostfile="${1:?a hostfile, as launch/hostfile}"
shift
hosts=$(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
by_ssh() { timeout 15 ssh -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} "$1" true; }
# DeepSpeed tries the first host only, and as long as TCP does.
lost=$({ for host in $hosts; do (by_ssh "$host" </dev/null >/dev/null 2>&1 || echo "$host") & done && wait; } | xargs)
if [ "$lost" ]; then
  echo "deepspeed.sh: $hostfile: no ssh to $lost within 15 s; log in there once without a password (ssh-copy-id)," \
    "start the machine, or take its line out." >&2
  exit 2
fi
launcher="${LAUNCHER:-pdsh}"
if [ "$(wc -w <<<"$hosts")" -gt 1 ] && [ "$launcher" = pdsh ] && ! command -v pdsh >/dev/null; then
  echo "deepspeed.sh: DeepSpeed reaches several hosts by pdsh, which is not here; install it, or set LAUNCHER." >&2
  exit 2
fi
exec deepspeed --hostfile "$hostfile" ${SSH_PORT:+--ssh_port "$SSH_PORT"} --num_accelerators 1 --no_local_rank \
  --master_port "${PORT:-29400}" --launcher "$launcher" --module elastic_lsopt.agent "$@"
