"""The sharpest directions of a model whose weights lie in shards on two processes, exact, and the same as on one.

    python examples/curvature_on_shards.py          # seconds on two cores; starts its own two processes

Each process holds half of the weights, half of every eigenvector and half of the batches.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import elastic_lsopt as lso


def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y)


def model_and_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 10))
    return model, [(torch.randn(32, 64), torch.randint(0, 10, (32,))) for _ in range(4)]


def sharpest(model, batches):
    space, oracle = lso.attach(model, loss, batches)
    found = lso.probes.lanczos(space, oracle, k=3, tolerance=1e-4, vectors=True)
    return found, space.layout.local_numel


def on_a_shard(rank, world, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    model, batches = model_and_batches()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    found, numel = sharpest(model, batches[rank::world])  # unit j of rank r is unit j * world + r of the batch
    for turn in range(world):
        if turn == rank:
            print(f"process {rank}: {numel} weights, {found.vectors.local_bytes} bytes of eigenvectors", flush=True)
        dist.barrier()
    if rank == 0:
        print("sharded: ", *(f"{x:.5f}" for x in found.eigenvalues), f"({found.products} products)")
    dist.destroy_process_group()


def main():
    found, numel = sharpest(*model_and_batches())
    print(f"one process: {numel} weights")
    print("whole:   ", *(f"{x:.5f}" for x in found.eigenvalues), f"({found.products} products)", flush=True)
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(on_a_shard, args=(2, meeting), nprocs=2)


if __name__ == "__main__":
    main()
