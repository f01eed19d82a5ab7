"""The main job as a module, for launchers:

torchrun --nproc-per-node 2 -m elastic_lsopt.train FILE.yaml [key=value …]
deepspeed --module elastic_lsopt.train FILE.yaml [key=value …]
"""

import sys

from elastic_lsopt.cli.main import command

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N, which the environment says too.
    command(["train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))])
