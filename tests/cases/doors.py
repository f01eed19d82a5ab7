"""Six updates of SAM by each door: a closure, an engine, space and oracle, the Trainer, accelerate, Lightning."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import elastic_lsopt as lso
from tests.cases import trainer as cases
from tests.cases.trainer import ACCUMULATED, LR, MOMENTUM, ROWS, STEPS, momentum, rank, world_size

Batch = dict[str, Tensor]
SAM = lso.SAM(**cases.METHODS["sam"])


def updates() -> Iterator[tuple[float, list[Batch], float]]:
    """The rate, this rank's micro-batches, and the tokens that all ranks train in each update."""
    data, size = cases.rows(), ROWS // ACCUMULATED // world_size()
    for k in range(STEPS):
        some = data[k * ROWS : (k + 1) * ROWS]
        units = [some[at : at + size] for at in range(0, len(some), size)]
        own = [{key: torch.stack([row[key] for row in unit]) for key in unit[0]} for unit in units]
        yield (
            LR * (1 - k / STEPS),
            own[rank() :: world_size()],
            float(sum((row["labels"][1:] != -100).sum() for row in some)),
        )


def share(batch: Batch, tokens: float) -> float:
    """What a micro-batch's mean weighs in the mean of an update, for gradients that are averaged over ranks."""
    return float((batch["labels"][:, 1:] != -100).sum()) / tokens * world_size()


def wrapped(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model


def by_closure(model: Any) -> None:
    ddp = wrapped(model)
    optimizer = lso.LandscapeOptimizer(momentum(model.named_parameters()), SAM)
    for rate, batches, tokens in updates():
        optimizer.param_groups[0]["lr"] = rate
        for batch in batches:

            @optimizer.accumulate
            def closure(batch: Batch = batch, tokens: float = tokens) -> Tensor:
                optimizer.zero_grad()
                loss = ddp(**batch).loss * share(batch, tokens)
                loss.backward()
                return loss

        optimizer.step(closure)


def by_initialize(model: Any) -> None:
    import deepspeed

    engine = lso.initialize(model=model, config={"zero_optimization": {"stage": 2}}, method=SAM, base=momentum)
    for rate, batches, _ in updates():
        engine.param_groups[0]["lr"] = rate
        engine.train_batch(batches)
    masters = {n: deepspeed.utils.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    engine.backend.engine.destroy()  # type: ignore[attr-defined]
    model.load_state_dict({n: t.clone() for n, t in masters.items()})


def by_attach(model: Any) -> None:
    ddp, base = wrapped(model), momentum(model.parameters())
    for rate, batches, _ in updates():
        base.param_groups[0]["lr"] = rate
        space, oracle = lso.attach(ddp, None, batches)
        oracle.install(SAM.gradient(space, oracle, SAM.init(space)))
        base.step()


def by_trainer(model: Any) -> None:
    with cases.fresh(), tempfile.TemporaryDirectory() as folder:
        args = cases.arguments("ddp", folder, world_size())
        chosen = torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}
        trainer = lso.LandscapeTrainer(
            model=model, args=args, train_dataset=cases.rows(), landscape=SAM, optimizer_cls_and_kwargs=chosen
        )
        trainer.train()


def by_accelerate(model: Any) -> None:
    from accelerate import Accelerator

    with cases.fresh():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        optimizer = lso.LandscapeOptimizer(momentum(model.named_parameters()), SAM)
        loader = DataLoader(cases.rows(), batch_size=ROWS // ACCUMULATED // world_size())  # type: ignore[arg-type]
        ddp, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        planned = [(rate, tokens) for rate, _, tokens in updates()]
        for number, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"], tokens = planned[number // ACCUMULATED]
            with accelerator.accumulate(ddp):

                @optimizer.accumulate
                def closure(batch: Batch = batch, tokens: float = tokens) -> Tensor:
                    optimizer.zero_grad()
                    loss = ddp(**batch).loss * share(batch, tokens)
                    accelerator.backward(loss * ACCUMULATED)  # which it divides by that
                    return loss

                optimizer.step(closure)


def by_lightning(model: Any) -> None:
    """Its automatic optimisation, an update a batch."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, update: Any, index: int) -> Tensor:
            [(_, batches, tokens)] = update
            return sum(self.model(**batch).loss * share(batch, tokens) for batch in batches)  # type: ignore[return-value]

        def configure_optimizers(self) -> Any:
            optimizer = lso.LandscapeOptimizer(momentum(self.named_parameters()), SAM)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    places: dict[str, Any] = {"strategy": "ddp", "use_distributed_sampler": False} if world_size() > 1 else {}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size(), max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **places,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(list(updates()), batch_size=1, collate_fn=list))  # type: ignore[arg-type]


DOORS = {
    "closure": by_closure, "initialize": by_initialize, "attach": by_attach, "trainer": by_trainer,
    "accelerate": by_accelerate, "lightning": by_lightning,
}  # fmt: skip


def apart() -> dict[str, float]:
    """How far the weights of each door end from the paper's."""
    found = {}
    for name, door in DOORS.items():
        model = cases.llama()
        door(model)
        found[name] = cases.apart(cases.trained_of(model), cases.by_paper("sam").weights)
    return found
