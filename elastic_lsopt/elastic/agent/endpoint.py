"""Where an agent finds its job: what a launcher says, or MPI.

Apart from `rendezvous.py`, which torch loads while it imports its own rendezvous: who needs only this must not be the
one that starts that.
"""

from __future__ import annotations

import socket

from elastic_lsopt.elastic.mail.mailbox import HERE
from elastic_lsopt.errors import UserError

ENDPOINT, JOB = "ELASTIC_LSOPT_ENDPOINT", "ELASTIC_LSOPT_JOB"
"""Names in the environment."""
NAME_BYTES = 256
"""Longest name of a processor in MPI."""


def endpoint_by_mpi() -> str:
    """Under mpirun: host:port where rank 0's agent will listen (collective); nothing of MPI is left when this returns.

    Raises UserError where mpi4py or its MPI library is missing.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        MPI.Init()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun has started this process, but mpi4py cannot be used ({error}); install mpi4py and its MPI "
            "library, or give elastic.endpoint=host:port of the first node."
        ) from None
    world, own = MPI.COMM_WORLD, MPI.Get_processor_name().encode()
    hosts = bytearray(NAME_BYTES * world.size)  # plain bytes: mpi4py's lower-case methods would pickle
    world.Allgather(own.ljust(NAME_BYTES, b"\0"), hosts)
    names = [hosts[i : i + NAME_BYTES].rstrip(b"\0").decode() for i in range(0, len(hosts), NAME_BYTES)]
    with socket.create_server(("", 0)) as free:
        port = bytearray(free.getsockname()[1].to_bytes(2, "big"))
    world.Bcast(port, root=0)
    MPI.Finalize()
    host = HERE if len(set(names)) == 1 else names[0]
    return f"{host}:{int.from_bytes(port, 'big')}"
