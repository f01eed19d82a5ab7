"""No device ever holds more of a sharded model than its part; a worker warms up beside the GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.checkpoint.huggingface.weights import give_memory
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.elastic.worker.runtime import Runtime
from elastic_lsopt.plan import Policy
from elastic_lsopt.training import elastic_job
from elastic_lsopt.training.building.engines import _shard
from elastic_lsopt.training.building.models import shape_and_weights
from elastic_lsopt.world import World

CPU = torch.device("cpu")


def a_config(**more: Any) -> TrainConfig:
    model = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    settings: dict[str, Any] = {
        "dataset": "stdlib", "model": model, "global_batch_size": 8, "max_steps": 2, "output_dir": "runs/a",
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    return TrainConfig(**settings | more)


@pytest.mark.fast
def test_a_model_has_no_memory_before_it_is_sharded() -> None:
    model, weights = shape_and_weights(a_config(backend="fsdp2"), vocabulary_size=512)
    assert weights is not None and all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


class Seen(Exception):
    pass


@pytest.mark.fast
def test_a_worker_warms_up_beside_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers of a node would each build the whole model on its first GPU."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    worlds: list[World] = []

    def build(world: World) -> Any:
        worlds.append(world)
        raise Seen

    config = a_config(elastic=ElasticConfig())
    runtime = SimpleNamespace(_life=SimpleNamespace(policy=Policy.of(config, parts=1), build=build))
    try:
        with pytest.raises(Seen):
            Runtime._warm_up(runtime)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    assert [(w.device, w.rehearsal, w.size) for w in worlds] == [(CPU, True, 1)] and not chosen


@pytest.mark.fast
def test_deepspeed_is_rehearsed_without_its_engine_where_that_would_take_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = a_config(backend="deepspeed", deepspeed="configs/deepspeed/zero3.json")
    monkeypatch.setattr(elastic_job, "on_gpu", lambda: False)
    assert elastic_job.rehearsed(zero) is zero
    monkeypatch.setattr(elastic_job, "on_gpu", lambda: True)
    told = elastic_job.rehearsed(zero)
    assert (told.backend, told.deepspeed) == ("replicated", None) and told.model == zero.model
    assert elastic_job.rehearsed(a_config(backend="fsdp2")).backend == "fsdp2"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sharding_takes_a_part_of_gpu_memory() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config, device = a_config(backend="fsdp2"), torch.device("cuda", 0)
    model, _ = shape_and_weights(config, vocabulary_size=512)
    size = sum(p.numel() for p in model.parameters()) * 4
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)  # eight ranks' mesh, one rank's memory
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _shard(config, model, World(0, 8, device, dist.HashStore()))
        give_memory(model, device)
        assert torch.cuda.max_memory_allocated() - before < size / 8 * 1.2
        assert torch.cuda.memory_allocated() - before < size / 8 * 1.2
    finally:
        dist.destroy_process_group()


@pytest.mark.fast
def test_a_parameter_without_dimensions_is_refused_before_it_is_sharded() -> None:
    model = torch.nn.Linear(3, 3)
    model.register_parameter("temperature", torch.nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(lso.UserError, match="parameter temperature has no dimensions, which FSDP2 does not take"):
        _shard(a_config(), model, World(0, 1, CPU, dist.HashStore()))
