"""Two replicas in a loop of your own: each on half of the ranks, SAM inside, a pull to the flatter one every 8 steps.

torchrun --nproc-per-node 2 examples/consensus_own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import elastic_lsopt as lso


def main() -> None:
    consensus = lso.join_replicas("mgrawa", replicas=2, tau=8, pull=0.5)  # in place of init_process_group
    torch.manual_seed(0)  # the same weights in all replicas
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    if torch.distributed.get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    engine = lso.Engine.of(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), method=lso.SAM(rho=0.05), consensus=consensus,
        loss_fn=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
    )  # fmt: skip
    samples = torch.Generator().manual_seed(consensus.number)  # each replica has samples of its own
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(7))
    for _ in range(40):
        x = torch.randn(64, 16, generator=samples)
        engine.train_batch([(x, (x @ teacher).argmax(1))])
    point = consensus.point()  # the model that the rule's paper evaluates, on all replicas
    engine.space.weights.copy_(point)
    engine.space.copies.refresh()
    if consensus.number == 0:
        told = consensus.exchanges[-1]
        apart = told.consensus_distance
        print(f"{len(consensus.exchanges)} exchanges of {len(told.members)} replicas, the last {apart:.3f} apart")


if __name__ == "__main__":
    main()
