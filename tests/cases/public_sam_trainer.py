"""SAM in a Trainer written out, right where no mistake is asked for; and the mistakes of the public one, each by name.

emptied         the gradient is emptied in every training_step, so that of an update only the last micro-batch counts
local_norms     the length of the ascent is a norm of what this rank holds
scaled          the ascent goes along the gradient as the loss was scaled for accumulation, against an unscaled norm
cloned          a copy of all weights is kept, on every rank
"""

from __future__ import annotations

import copy
import gc
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer

import elastic_lsopt as lso
from tests.cases import trainer as cases


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Any) -> Tensor:
    return getattr(t, "_local_tensor", t)


class PublicSAMTrainer(Trainer):
    mistake, rho = "", 0.0

    def get_batch_samples(self, *args: Any, **more: Any) -> Any:
        (self.own, count), self.ran = super().get_batch_samples(*args, **more), 0
        return self.own, count

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.ran += 1
        if self.ran < len(self.own):
            return torch.zeros(())

        def one_pass() -> Tensor:
            model.zero_grad()
            total = torch.zeros(())
            for batch in self.own:
                if self.mistake == "emptied":
                    model.zero_grad()
                total += super(PublicSAMTrainer, self).training_step(model, copy.copy(batch), num_items_in_batch)
            return total

        loss = one_pass()
        params = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        norms = [(local(p.grad) if self.mistake == "local_norms" else whole(p.grad)).norm() for p in params]
        length = torch.stack(norms).norm()
        scale = len(self.own) if self.mistake == "scaled" else 1.0
        keep = whole if self.mistake == "cloned" else local
        kept = [keep(p.detach()).clone() for p in params]
        with torch.no_grad():
            for p in params:
                local(p).add_(local(p.grad), alpha=float(self.rho * scale / (length + 1e-12)))
        one_pass()
        with torch.no_grad():
            for p, old in zip(params, kept, strict=True):
                cut = self.mistake == "cloned" and hasattr(p, "full_tensor")
                own = distribute_tensor(old, p.device_mesh, p.placements) if cut else old
                local(p).copy_(local(own))
        return loss


def bytes_alive() -> int:
    """Of all tensors of this process that a garbage collector can see, each memory once."""
    gc.collect()
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (Tensor, torch.nn.Parameter)
    }
    return sum(seen.values())


def told_apart(kind: str, mistake: str, ours: bool) -> dict[str, Any]:
    """How far SAM's weights end from the paper's; the bytes that a second pass keeps beside the first, as a share of
    the whole model's weights."""
    wanted = cases.by_paper("sam").weights
    size = sum(t.numel() * t.element_size() for t in wanted.values())
    alive: list[int] = []
    parent = lso.LandscapeTrainer if ours else PublicSAMTrainer

    class Watched(cases.trainer_class(kind, parent)):
        def compute_loss(self, *args: Any, **more: Any) -> Any:
            if self.state.global_step == 2:  # in its second step and later: momentum is there
                alive.append(bytes_alive())
            return super().compute_loss(*args, **more)

    with cases.fresh(), tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {"landscape": lso.SAM(**cases.METHODS["sam"])} if ours else {}
        args = cases.arguments(kind, folder, cases.world_size())
        chosen = torch.optim.SGD, {"lr": cases.LR, "momentum": cases.MOMENTUM}
        trainer = Watched(
            model=cases.llama(), args=args, train_dataset=cases.rows(), optimizer_cls_and_kwargs=chosen, **more
        )
        trainer.mistake, trainer.rho = mistake, cases.METHODS["sam"]["rho"]
        trainer.train()
        dw = cases.apart(cases.weights_of(trainer), wanted)
    first, second = alive[1], alive[cases.ACCUMULATED + 1]
    return {"dw": dw, "kept": (second - first) / size}
