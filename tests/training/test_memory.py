"""The bytes that we promise against torch's own tensors, and against the figures of the ZeRO paper."""

import pytest
import torch

from elastic_lsopt.training.memory import memory_per_rank, mirror_per_rank

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
        ("sgd0", lambda p: torch.optim.SGD(p, lr=1e-3)),
    ],
)
def test_replicated_is_what_torch_holds(optim, make):
    model = torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Linear(33, 5))
    optimizer = make(model.parameters())
    model(torch.ones(2, 17)).sum().backward()
    optimizer.step()
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradient": sum(p.grad.nbytes for p in model.parameters()),
        # Adam's step counters are one number a tensor, which no count of parameters sees.
        "optimizer state": sum(
            t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim
        ),
    }
    promised = memory_per_rank(
        sum(p.numel() for p in model.parameters()), backend="replicated", world=4,
        optim=optim.rstrip("0"), momentum=0.0 if optim.endswith("0") else 0.9,
    )  # fmt: skip
    assert {key: promised[key] for key in held} == held
    assert sum(promised.values()) == sum(held.values())


# Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", figure 1: 7.5e9
# parameters, 64 ranks, mixed precision with Adam; in gigabytes of 1e9 bytes.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figures_of_the_zero_paper(stage, gigabytes):
    ours = memory_per_rank(7_500_000_000, backend="deepspeed", stage=stage, world=64, bf16=True, optim="adamw")
    assert sum(ours.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("backend", "stage", "bf16", "shards"),
    [
        ("replicated", 0, False, 4), ("fsdp2", 0, False, 1), ("fsdp2", 0, True, 1),
        ("deepspeed", 1, False, 0), ("deepspeed", 2, False, 0), ("deepspeed", 3, False, 1),
        ("deepspeed", 1, True, 0), ("deepspeed", 2, True, 0), ("deepspeed", 3, True, 0),
    ],
)  # fmt: skip
def test_what_sam_adds_to_its_base(backend, stage, bf16, shards):
    """In fp32 shards of a quarter of the parameters."""

    def total(method):
        return sum(memory_per_rank(4000, backend=backend, stage=stage, world=4, bf16=bf16, method=method).values())

    assert total("sam") - total("none") == shards * 4 * 1000
    assert total("lpf_sgd") == total("sam")
    assert total("asam") - total("sam") == 4 * (4000 if backend == "replicated" else 1000)


def test_shards_divide_by_the_ranks_of_a_replica_group_and_round_up():
    def weights(**how):
        return memory_per_rank(1001, backend="fsdp2", **how)["weights"]

    assert weights(world=1) == 4 * 1001
    assert weights(world=4) == 4 * 251
    assert weights(world=4, replicas=2) == 4 * 501


def test_a_gathered_block_is_in_the_precision_of_the_forward():
    key = "gathered or cast copies"
    assert memory_per_rank(1000, backend="fsdp2", world=4, gathered=100)[key] == 400
    assert memory_per_rank(1000, backend="fsdp2", world=4, gathered=100, bf16=True)[key] == 200
    assert memory_per_rank(1000, backend="deepspeed", stage=3, world=4, gathered=100)[key] == 400
    assert memory_per_rank(1000, backend="deepspeed", stage=2, world=4, gathered=100)[key] == 0
    assert memory_per_rank(1000, backend="replicated", world=4)[key] == 0


@pytest.mark.parametrize(
    ("how", "own", "mirrored_peers"),
    [
        # 4 bytes x (weights, two of Adam's states) x 3 versions; a shard is a quarter of 1000.
        ({"backend": "fsdp2", "world": 4}, 9000, 9000),
        ({"backend": "fsdp2", "world": 4, "copies": 2}, 9000, 18000),
        ({"backend": "fsdp2", "world": 2, "copies": 2}, 18000, 18000),  # there is but one other
        ({"backend": "fsdp2", "world": 1}, 36000, 0),
        ({"backend": "fsdp2", "world": 4, "replicas": 2}, 18000, 0),  # the replica is the copy
        ({"backend": "fsdp2", "world": 4, "replicas": 2, "copies": 2}, 18000, 18000),
        ({"backend": "replicated", "world": 4}, 36000, 0),
        ({"backend": "deepspeed", "stage": 0, "world": 4}, 36000, 0),
        ({"backend": "deepspeed", "stage": 2, "world": 4}, 9000, 9000),
        ({"backend": "fsdp2", "world": 4, "optim": "sgd"}, 3000, 3000),
        ({"backend": "fsdp2", "world": 4, "optim": "sgd", "momentum": 0.9, "vectors": 1}, 9000, 9000),
    ],
)
def test_the_mirror_is_versions_times_shards(how, own, mirrored_peers):
    three = 3 * 2**15  # what is no tensor
    told = mirror_per_rank(1000, **how)
    assert told == {
        "own versions": own + three,
        "mirrored peers' versions": mirrored_peers + mirrored_peers // own * three,
    }
    assert mirror_per_rank(1000, **how, budget_bytes=2**30) == {key: value // 3 * 10 for key, value in told.items()}
