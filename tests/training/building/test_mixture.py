"""A mixture of experts in a job: its routers' load-balancing loss is trained on where the model adds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.training.building.engines import loss_of, plain_loss_of
from elastic_lsopt.training.building.models import build_model

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("router", [False, True])
def test_the_routers_loss(router: bool, bf16: bool) -> None:
    model = MIXTRAL | {"output_router_logits": router}
    config = TrainConfig(dataset="text.txt", output_dir="out", max_steps=1, model=model, bf16=bf16,
                         backend="replicated")  # fmt: skip
    net = build_model(config)
    ids = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    out = net(**batch, output_router_logits=True)
    extra = 0.5 * out.aux_loss.item()
    tokens = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    wanted = tokens + extra if router else tokens
    assert extra > 0.5
    assert plain_loss_of(config, net)(net, batch).item() == pytest.approx(wanted, rel=1e-5)
    assert loss_of(config, net)(net, batch).item() == pytest.approx(wanted, rel=1e-2 if bf16 else 1e-5)
