"""SAM on DeepSpeed inside Lightning's automatic optimisation, beside the paper's loop on one process."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.trainer import FAMILY as METHODS
from tests.cases.trainer import named_as_in
from tests.oracles import paper_loops

STEPS = 5


class Module(lightning.LightningModule):
    """`net` on batches of (x, y), with a rate that falls from step to step; notes what it was asked."""

    def __init__(self, net: nn.Module, wanted: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.wanted = net, [wanted]  # in a list: no module of this one
        self.found: dict[str, Any] = {"forwards": 0, "evaluated": 0}

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.found["forwards"] += 1
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.found["evaluated"] += 1
        assert not self.net.training and bool(self.net(batch[0]).isfinite().all())

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda k: 1 - k / STEPS)
        return {"optimizer": base, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        step, [wanted] = strategy.landscape, self.wanted
        self.found |= {
            "dw": engines.furthest(step.space, nn.ModuleDict({"net": wanted})), "place": step.backend.name,
            "steps": (self.trainer.global_step, step.clock.steps), "norm": strategy.last_step.gradient_norm,
            "rate": step.backend.param_groups[0]["lr"],
        }  # fmt: skip


class Falling:
    """An optimizer of the paper's loop with the same schedule."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state
        self.schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda k: 1 - k / STEPS)

    def step(self) -> None:
        self.base.step()
        self.schedule.step()


def trainer_with(strategy: Any, **more: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        **{"max_epochs": 1, "enable_checkpointing": False} | more,
    )  # fmt: skip


def against_paper(stage: int, method: str, accumulated: int, clip: float, extra: list[str]) -> dict[str, Any]:
    """Five updates of some micro-batches per rank, and an evaluation after them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    updates, hyper = engines.batches(STEPS, world * accumulated), METHODS.get(method, engines.HYPERPARAMETERS[method])
    plain = engines.net(extra)
    module = Module(copy.deepcopy(plain), plain)
    base: Any = Falling(torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.2, momentum=0.5))
    with named_as_in(nn.ModuleDict({"net": plain})):
        losses = paper_loops.run(plain, updates, base, method, hyper, clip=clip)
    strategy = lso.LandscapeDeepSpeedStrategy(
        {"zero_optimization": {"stage": stage}}, lso.registry.build(method, **hyper)
    )
    trainer = trainer_with(strategy, accumulate_grad_batches=accumulated, gradient_clip_val=clip or None)
    own = [unit for update in updates for unit in update[rank::world]]
    trainer.fit(module, DataLoader(own, batch_size=None), DataLoader(own[:2], batch_size=None))
    logged = trainer.callback_metrics["loss"].reshape(1).clone()
    dist.all_reduce(logged)
    strategy.model.destroy()  # type: ignore[union-attr]
    return module.found | {"logged": float(logged) / world, "mean_loss": sum(losses) / len(losses)}


def resumed(path: str) -> float:
    """max |dw| of a run that is saved after three updates and gone on with by another process's objects, from one that
    never stopped."""

    class Kept(Module):
        folder = ""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)

        def on_train_start(self) -> None:
            if self.folder:
                lso.load(self.trainer.strategy.landscape, self.folder)  # type: ignore[attr-defined]

        def on_train_end(self) -> None:
            strategy: Any = self.trainer.strategy
            self.found["weights"] = engines.whole(strategy.landscape.space)
            self.found["steps"] = strategy.landscape.clock.steps
            if not self.folder and self.trainer.global_step == 3:
                lso.save(strategy.landscape, path)

    own, found = [update[dist.get_rank()] for update in engines.batches(STEPS, dist.get_world_size())], []
    for units, folder in ((own, ""), (own[:3], ""), (own[3:], path)):
        module = Kept(engines.net(seed=1 if folder else 0))
        module.folder = folder
        strategy = lso.LandscapeDeepSpeedStrategy({"zero_optimization": {"stage": 3}}, lso.SAM(rho=0.3))
        trainer_with(strategy).fit(module, DataLoader(units, batch_size=None))  # type: ignore[arg-type]
        strategy.model.destroy()  # type: ignore[union-attr]
        found.append(module.found)
    assert [f["steps"] for f in found] == [5, 3, 5]
    whole, after = found[0]["weights"], found[2]["weights"]
    return max(float((whole[n] - after[n]).abs().max()) for n in whole)


def refusals() -> list[str]:
    """What is refused with words that name it, in one line."""

    class ByHand(Module):
        automatic_optimization = False

    class Clips(Module):
        def configure_gradient_clipping(self, *args: Any, **named: Any) -> None:
            pass

    class Nothing(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index else super().training_step(batch, index)

    lpf = lso.LPFSGD(parts=3, alpha=1.0)
    wrong: list[tuple[str, type[Module], Any, dict[str, Any], str]] = [
        ("parts", Module, lpf, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 micro-batches; set it to 3"),
        ("by hand", ByHand, lso.SAM(), {}, "automatic_optimization=False runs backward itself"),
        ("checkpoints", Module, lso.SAM(), {"enable_checkpointing": True}, "call lso.save(strategy.landscape, folder)"),
        ("by value", Module, lso.SAM(), {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "by norm"),
        ("batch norm", Module, lso.SAM(), {"sync_batchnorm": True}, "sync_batchnorm is not tested"),
        ("own clipping", Clips, lso.SAM(), {}, "Clips.configure_gradient_clipping would not be called"),
        ("twice", Module, lso.SAM(), {}, "make a new Trainer, strategy and module"),
        ("nothing returned", Nothing, lso.SAM(), {}, "training_step"),
    ]  # fmt: skip
    [[batch, *_]], told = engines.batches(1, 2), []
    for name, kind, method, more, says in wrong:
        strategy = lso.LandscapeDeepSpeedStrategy({"zero_optimization": {"stage": 2}}, method)
        module, loader = kind(engines.net(), engines.net()), DataLoader([batch] * 4, batch_size=None)  # type: ignore[arg-type]
        try:
            trainer = trainer_with(strategy, **more)
            trainer.fit(module, loader)
            if name == "twice":
                trainer.fit(module, loader)
        except (lso.UserError, RuntimeError) as error:
            told.append(name if says in str(error) and "\n" not in str(error) else f"{name}: {error}")
        else:
            told.append(f"{name}: not refused")
    return told


def in_bf16() -> dict[str, Any]:
    """The types of the weights in the forward, and the loss after two epochs in fp32 and in bf16."""
    types, losses = set(), []
    for precision in ("32-true", "bf16-true"):
        module = Module(engines.net(), engines.net())
        strategy = lso.LandscapeDeepSpeedStrategy({"zero_optimization": {"stage": 3}}, lso.SAM(rho=0.05))
        own = [
            unit for update in engines.batches(STEPS, dist.get_world_size()) for unit in update[dist.get_rank() :: 2]
        ]
        trainer = trainer_with(strategy, precision=precision)
        trainer.fit(module, DataLoader(own, batch_size=None))  # type: ignore[arg-type]
        losses.append(float(trainer.callback_metrics["loss"]))
        if precision == "bf16-true":
            types = {str(p.dtype) for p in module.parameters()}
        strategy.model.destroy()  # type: ignore[union-attr]
    return {"types": sorted(types), "losses": losses}
