"""What is kept from step to step against torch's own tensors, and against the figures of the ZeRO paper."""

from dataclasses import replace

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.estimate.activations import Pass, Segment
from elastic_lsopt.training.estimate.offload import on_host
from elastic_lsopt.training.estimate.placement import Placement
from elastic_lsopt.training.estimate.probes import probe_vectors
from elastic_lsopt.training.estimate.rank import memory_of_rank
from elastic_lsopt.training.estimate.size import ModelSize
from elastic_lsopt.training.estimate.state import average_vectors, mirror_per_rank, state_per_rank
from elastic_lsopt.training.pace import vectors_watched

pytestmark = pytest.mark.fast
NOTHING = Pass((Segment("forward", None, 0, 0, 0, 0),), 0)
"""The pass of a model whose activations take nothing."""


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
        # Adam's step counters are one number a tensor, which no count of parameters sees.
        "optimizer state": sum(
            t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim
        ),
    }
    promised = state_per_rank(
        sum(p.numel() for p in model.parameters()), Placement(backend="replicated", world=4),
        optim=optim.rstrip("0"), momentum=0.0 if optim.endswith("0") else 0.9,
    )  # fmt: skip
    assert {key: promised[key] for key in held} == held
    assert sum(promised.values()) == sum(held.values())


def test_soap_keeps_square_matrices_too():
    model = torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Linear(33, 5, bias=False))
    base = lso.UpdateOptimizer(model.parameters(), "soap", lr=1e-3)
    engine = lso.Engine.of(model, base, loss_fn=lambda model, x: model(x).square().mean())
    engine.train_batch([torch.ones(2, 17)])
    state = engine.families["update/soap"].state_dict().values()
    size = ModelSize.of(model, [])
    for world, share in ((1, 1), (4, 4)):
        at = Placement(backend="replicated", world=world)
        told = state_per_rank(size.parameters, at, optim="soap", grams=size.grams)["optimizer state"]
        assert told == -(-sum(v.local_bytes for v in state if not isinstance(v, int | float)) // 4 // share) * 4


# Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", figure 1: 7.5e9
# parameters, 64 ranks, mixed precision with Adam; in gigabytes of 1e9 bytes. DeepSpeed's buckets are not the paper's.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figures_of_the_zero_paper(stage, gigabytes):
    at = Placement(backend="deepspeed", stage=stage, world=64, bf16=True)
    at = replace(at, zero=replace(at.zero, reduce_bucket=0, prefetch=0, persistence=0, reuse=0))
    ours = memory_of_rank(ModelSize(parameters=7_500_000_000), NOTHING, at, microbatches=2)
    assert (sum(ours.kept.values()) + sum(ours.in_pass.values())) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("backend", "stage", "bf16", "shards"),
    [
        ("replicated", 0, False, 4), ("fsdp2", 0, False, 1), ("fsdp2", 0, True, 1),
        ("deepspeed", 1, False, 0), ("deepspeed", 2, False, 0), ("deepspeed", 3, False, 0),
        ("deepspeed", 1, True, 0), ("deepspeed", 2, True, 0), ("deepspeed", 3, True, 0),
    ],
)  # fmt: skip
def test_what_sam_adds_to_its_base(backend, stage, bf16, shards):
    """In fp32 shards of a quarter of the parameters."""

    def total(method):
        at = Placement(backend=backend, stage=stage, world=4, bf16=bf16)
        return sum(state_per_rank(4000, at, method=method).values())

    assert total("sam") - total("none") == shards * 4 * 1000
    assert total("lpf_sgd") == total("sam")
    assert total("asam") - total("sam") == 4 * (4000 if backend == "replicated" else 1000)


def test_shards_divide_by_the_ranks_of_a_replica_group_and_round_up():
    def weights(**how):
        return state_per_rank(1001, Placement(backend="fsdp2", **how))["weights"]

    assert weights(world=1) == 4 * 1001
    assert weights(world=4) == 4 * 251
    assert weights(world=4, replicas=2) == 4 * 501


def test_averages_and_schedules_hold_vectors():
    """LAWA its k, others one; AutoDrop two and the noise scale one; of 1,000 parameters on two ranks."""
    assert average_vectors({"ema": {}, "lawa": {}, "short": {"import": "lawa", "k": 2}, "own": {"import": "a:B"}}) == 10
    noise = {"kind": "noise_scale", "max_global_batch_size": 64}
    config = TrainConfig(
        dataset="a", output_dir="b", model={"model_type": "llama"}, max_steps=1, lr_scheduler_type="autodrop",
        learning_rate=0.1, batch_schedule=noise,  # type: ignore[arg-type]
    )  # fmt: skip
    assert vectors_watched(config) == 3
    at = Placement(backend="fsdp2", world=2)
    kept = memory_of_rank(ModelSize(parameters=1000), None, at, averages=10, watched=3).kept
    assert (kept["averages of the weights"], kept["what schedules watch"]) == (20000, 6000)


def test_probes_hold_vectors():
    """By the docstrings of lanczos.py, lobpcg.py and spectral_density.py."""
    every = {"every_steps": 10}
    assert probe_vectors({"top_eigenvalues": {**every, "k": 2, "capacity": 40}}) == (0, 44)
    assert probe_vectors({"mine": {**every, "measure": "spectral_density", "steps": 30}, "trace": every}) == (0, 34)
    assert probe_vectors({"lobpcg": {**every, "k": 3}}) == (0, 8 * (3 + 2))
    assert probe_vectors({"lambda_max": {**every, "basis_device": "cpu"}}) == (0, 4)
    assert probe_vectors({"trajectory": every})[0] == 3
    size, at = ModelSize(parameters=1000), Placement(backend="fsdp2", world=4)
    ours = memory_of_rank(size, NOTHING, at, probes=(3, 44), microbatches=2)
    assert ours.kept["probes"] == 3 * 1000 and ours.in_probe["probes while they measure"] == 44 * 1000


def test_frozen_weights_have_neither_master_nor_state():
    ours = state_per_rank(1000, Placement(backend="fsdp2", world=2), frozen=600)
    assert (ours["weights"], ours["frozen weights"]) == (4 * 500, 4 * 300)
    assert ours["optimizer state"] == 8 * 500 and sum(ours.values()) == 4 * 500 + 4 * 300 + 8 * 500


@pytest.mark.parametrize(
    ("how", "bytes_each", "ranks"),
    [
        ({"backend": "replicated"}, 4, 1),
        ({"backend": "replicated", "base_bf16": True}, 2, 1),
        ({"backend": "fsdp2", "bf16": True}, 4, 4),  # cast for the forward alone
        ({"backend": "fsdp2", "base_bf16": True}, 2, 4),
        ({"backend": "deepspeed", "stage": 2, "bf16": True}, 2, 1),
        ({"backend": "deepspeed", "stage": 3, "bf16": True, "base_bf16": True}, 2, 4),
    ],
)
def test_a_frozen_base_in_its_own_type(how, bytes_each, ranks):
    ours = state_per_rank(400, Placement(world=4, **how), frozen=8000)
    assert ours["frozen weights"] == bytes_each * 8000 // ranks


# Ren et al., "ZeRO-Offload", 2021, section 3: on the device the bf16 weights alone, on the host 4 bytes a master and
# 8 of Adam's state; and of ours 4 a gradient in fp32. Beside, DeepSpeed's buffers.
def test_zero_offload_leaves_the_weights_on_the_device():
    at = Placement(backend="deepspeed", stage=2, world=4, bf16=True, optimizer_on_host=True)
    ours = memory_of_rank(ModelSize(parameters=4000, largest=100), NOTHING, at, microbatches=2)
    device, host = ours.parted(on_host(at))
    assert sum(device.kept.values()) == 2 * 4000 + 2 * 100 and sum(device.in_step.values()) == 0
    assert sum(host.kept.values()) == (4 + 8 + 4) * 1000 + 2 * (1000 + 1000 + 100)


@pytest.mark.parametrize("stage", [0, 3])
def test_offload_moves_parts_and_loses_none(stage):
    how = {"world": 4, "optimizer_on_host": True, "weights_on_host": True}
    backend = {"backend": "deepspeed", "stage": 3} if stage else {"backend": "fsdp2"}
    size = ModelSize(parameters=4000, largest=100)
    with_it, without = Placement(**backend, **how), Placement(**backend, world=4)
    device, host = (
        {n: b for n, b in part.kept.items() if b}
        for part in memory_of_rank(size, NOTHING, with_it, method="asam", averages=1).parted(on_host(with_it))
    )
    there = {n: b for n, b in memory_of_rank(size, NOTHING, without, method="asam", averages=1).kept.items() if b}
    assert host.keys() >= {"weights", "optimizer state", "averages of the weights"} and not device.keys() & host.keys()
    assert device | {n: b for n, b in host.items() if n != "gradient in fp32"} == there


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
    how = dict(how)
    three = 3 * 2**15  # what is no tensor
    kept = {key: how.pop(key) for key in ("optim", "momentum", "vectors", "copies") if key in how}
    told = mirror_per_rank(1000, Placement(**how), **kept)
    assert told == {
        "own versions": own + three,
        "mirrored peers' versions": mirrored_peers + mirrored_peers // own * three,
    }
    assert mirror_per_rank(1000, Placement(**how), **kept, budget_bytes=2**30) == {
        key: value // 3 * 10 for key, value in told.items()
    }
