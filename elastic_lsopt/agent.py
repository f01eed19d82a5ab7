"""The node agent of an elastic job as a module, one a node, for launchers:

torchrun --rdzv-backend=lsopt --rdzv-endpoint=HOST:PORT --nnodes=1:8 --nproc-per-node=1 -m elastic_lsopt.agent FILE.yaml
deepspeed --hostfile=hosts --num_gpus=1 --module elastic_lsopt.agent FILE.yaml
mpirun -n 4 --map-by node python -m elastic_lsopt.agent FILE.yaml
"""

import sys

from elastic_lsopt.cli.main import command

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N.
    command(["agent", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))])
