"""The contract of an oracle, as cases for one engine kind each: exact weights, idle slots, borrowed gradients, parts,
dropout."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from tests.cases import engines
from tests.cases.contract import dtype_of, engine_of, furthest, gathered, vector_of
from tests.oracles import paper_loops

MASKED = -100


def mean_over_unmasked(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Written as people write it: 0 / 0 without a label, and NaN again in its backward pass."""
    kept = (batch[1] != MASKED).to(out.dtype)
    each = nn.functional.cross_entropy(out, batch[1].clamp(min=0), reduction="none")
    return (each * kept).sum() / kept.sum()


def masked_loss() -> lso.Loss:
    """The mean over unmasked labels; NaN where a unit has none, which its weight 0 must keep out of every sum."""
    return lso.Loss(
        forward=lambda model, batch: model(batch[0]),
        criterion=mean_over_unmasked,
        count=lambda batch: float((batch[1] != MASKED).sum()),
    )


def masked_units(units: int, dtype: torch.dtype, *, empty: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Units of 2, 3, 4 … samples with every third label masked; all labels of unit `empty`."""
    torch.manual_seed(5)
    out = []
    for u in range(units):
        x = torch.randn(2 + u, engines.FEATURES).to(dtype)
        y = torch.randint(0, engines.CLASSES, (2 + u,))
        y[(torch.arange(2 + u) + u) % 3 == 0] = MASKED
        y = torch.full_like(y, MASKED) if u == empty else y
        out.append((x.to(engines.DEVICE), y.to(engines.DEVICE)))
    return out


def plain_mean(model: nn.Module, units: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the mean over all unmasked labels of all units at once."""
    x, y = torch.cat([b[0] for b in units]), torch.cat([b[1] for b in units])
    kept = y != MASKED
    loss = nn.functional.cross_entropy(model(x[kept]), y[kept])
    named = paper_loops.trained(model)
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def weighted_mean(
    kind: str,
    units: int,
    parts: int = 1,
    empty: int | None = None,
    zero: dict[str, Any] | None = None,
    bf16: bool = False,
    dtype: str = "fp64",
) -> dict[str, float]:
    """Distance of loss and gradient (one pass of `parts` parts) from the mean over all unmasked labels at once."""
    engine = engine_of(kind, zero, bf16, dtype, extra=(), loss_fn=masked_loss())
    global_batch = masked_units(units, dtype_of(kind, dtype, bf16), empty=empty)
    loss, gradient = plain_mean(engines.net((), dtype_of(kind, dtype, bf16)), global_batch)
    oracle = engine.oracle(engines.mine(global_batch))
    with oracle.accumulating() as total:
        for part in oracle.parts(parts):
            part.backward()
    borrowed = total.gradient
    out = {
        "gradient": furthest(gathered(engine.space, borrowed.tensors), gradient),
        "norm": abs(engine.space.norm(borrowed) - paper_loops.norm(list(gradient.values()))),
        "pass loss": abs(oracle.losses[0] - loss),
        "loss": abs(oracle.loss() - loss),
        "evaluate": abs(engine.evaluate([engines.mine(global_batch)]) - loss),
        "weight": float(oracle.weight) - sum(int((y != MASKED).sum()) for _, y in global_batch),
    }
    engines.close(engine)
    return out


@contextmanager
def logged() -> Any:
    """The messages of the package's logger inside the block."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("elastic_lsopt")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def poisoned(
    kind: str, method: str, bad_pass: int, zero: dict[str, Any] | None = None, bf16: bool = False
) -> dict[str, Any]:
    """One unit's loss is NaN in pass `bad_pass` of step 1, on the last rank only; steps 0 and 2 are whole."""
    world, rank, units = dist.get_world_size(), dist.get_rank(), 9
    hyper = engines.HYPERPARAMETERS[method]
    dtype = dtype_of(kind, "fp32", bf16)
    steps = engines.batches(3, units, dtype=dtype)
    poison = {"on": False, "calls": 0}
    bad_unit = max(u for u in range(units) if u % world == world - 1)

    def loss(model: Any, batch: Any) -> Tensor:
        value = paper_loops.cross_entropy(model, batch)
        if poison["on"] and rank == world - 1 and batch[0] is steps[1][bad_unit][0]:
            poison["calls"] += 1
            if poison["calls"] == bad_pass:
                return value * float("nan")
        return value

    plain = engines.net((), dtype)
    model = copy.deepcopy(plain)
    named = list(plain.named_parameters())
    total = 3 * units * 4
    engine = engines.build(
        kind, model, lso.registry.build(method, **{**hyper, **({"alpha": 1.0} if method == "lpf_sgd" else {})}),
        zero=zero, bf16=bf16, loss_fn=loss, total_samples=total,
    )  # fmt: skip
    engine.train_batch(engines.mine(steps[0]))
    before = [t.clone() for t in _weights_and_state(engine)]
    poison["on"] = True
    with logged() as messages:
        engine.train_batch(engines.mine(steps[1]))
    poison["on"] = False
    report = engine.last_step
    assert report
    after = _weights_and_state(engine)
    out: dict[str, Any] = {
        "skipped": report.skipped, "count": engine.skipped_steps, "messages": messages, "settled": engine.space.in_sync,
        "same": len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "samples": engine.clock.samples, "steps": engine.clock.steps,
    }  # fmt: skip
    engine.train_batch(engines.mine(steps[2]))
    assert engine.last_step
    out["next skipped"] = engine.last_step.skipped
    if method != "lpf_sgd":  # its third step draws other noise than the second of a run of two
        paper_loops.run(plain, [steps[0], steps[2]], engines.optimizer("momentum")(named), method, hyper)
        out["dw"] = engines.furthest(engine.space, plain)
    engines.close(engine)
    return out


def _weights_and_state(engine: lso.Engine) -> list[Tensor]:
    space = engine.space
    return [*space.weights.tensors, *space.shards.working, *space.base_state("momentum_buffer").tensors]


def borrowed_gradients(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, str]:
    """What reading a borrowed gradient gives after each event that changes the engine's gradient buffer."""
    engine = engine_of(kind, zero, bf16, extra=())
    space = engine.space
    own = engines.mine(engines.batches(1, 3, dtype=dtype_of(kind, "fp32", bf16))[0])

    def another_pass(oracle: Any, borrowed: Any) -> None:
        oracle.gradient()

    def another_oracle(oracle: Any, borrowed: Any) -> None:
        engine.oracle(own).gradient()

    def install(oracle: Any, borrowed: Any) -> None:
        oracle.install(space.zeros())

    def step(oracle: Any, borrowed: Any) -> None:
        engine.train_batch(own)

    def loss(oracle: Any, borrowed: Any) -> None:
        oracle.loss()

    def own_install(oracle: Any, borrowed: Any) -> None:
        oracle.install(borrowed)

    out = {}
    for event in (another_pass, another_oracle, install, step, loss, own_install):
        oracle = engine.oracle(own)
        borrowed = oracle.gradient()
        values = [t.clone() for t in borrowed.tensors]
        kept = borrowed.clone()
        event(oracle, borrowed)
        try:
            out[event.__name__] = "same" if _equal(borrowed.tensors, values) else "changed"
        except lso.StaleGradient:
            out[event.__name__] = "StaleGradient"
        assert _equal(kept.tensors, values), "a clone changed"
    engines.close(engine)
    keeps = Keeps()
    engine = engine_of(kind, zero, bf16, extra=(), method=keeps, clip=1e-3)  # clipping scales the buffer in place
    engine.train_batch(own)
    try:
        out["own_step"] = str(len(keeps.borrowed.tensors))
    except lso.StaleGradient:
        out["own_step"] = "StaleGradient"
    engines.close(engine)
    return out


class Keeps:
    """A method that holds on to its gradient."""

    parts = 1
    borrowed: Any = None

    def init(self, space: Any) -> dict[str, Any]:
        return {}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        self.borrowed = oracle.gradient()
        return self.borrowed


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def installed(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, float]:
    """An installed vector is what plain SGD steps with: w - 0.1 v."""
    engine = engine_of(kind, zero, bf16, extra=(), base="sgd", method=Fixed())
    before = gathered(engine.space, engine.space.weights.tensors)
    engine.train_batch(engines.mine(engines.batches(1, 3, dtype=dtype_of(kind, "fp32", bf16))[0]))
    assert engine.last_step
    wanted = {n: w - 0.1 * _fixed(n, w.numel()).double().reshape(w.shape) for n, w in before.items()}
    length = paper_loops.norm([_fixed(n, w.numel()) for n, w in before.items()])
    out = {
        "dw": furthest(gathered(engine.space, engine.space.weights.tensors), wanted),
        "norm": abs(engine.last_step.gradient_norm / length - 1),
    }
    engines.close(engine)
    return out


def _fixed(name: str, numel: int) -> Tensor:
    return torch.cos(torch.arange(numel, dtype=torch.float32) + len(name))


class Fixed:
    """A method that steps with a known vector."""

    parts = 1

    def init(self, space: Any) -> dict[str, Any]:
        return {}

    def gradient(self, space: Any, oracle: Any, state: Any) -> Any:
        oracle.gradient()
        return vector_of(space, {p.name: _fixed(p.name, p.numel) for p in space.layout.parameters})


def misuses(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, str]:
    """What each wrong use says, on every rank; the engine trains on after all of them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = engine_of(kind, zero, bf16, extra=())
    [units] = engines.batches(1, 6, dtype=dtype_of(kind, "fp32", bf16))
    own = engines.mine(units)
    oracle = engine.oracle(own)

    def parts_out_of_order() -> None:
        with oracle.accumulating():
            oracle.parts(3)[1].backward()

    def missing_part() -> None:
        with oracle.accumulating():
            oracle.parts(2)[0].backward()

    def no_part() -> None:
        with oracle.accumulating():
            pass

    def other_cut() -> None:
        with oracle.accumulating():
            oracle.parts(2)[0].backward()
            oracle.parts(3)[1].backward()

    def outside() -> None:
        oracle.parts(1)[0].backward()

    def early() -> None:
        with oracle.accumulating() as total:
            _ = total.gradient

    def twice_in_one_rank() -> None:
        engine.oracle([*own, own[0]] if rank == 0 else own)

    def at_the_wrong_rank() -> None:
        engine.oracle([lso.MicroBatch(u.index + 1, u.batch) for u in own])

    uses: list[Callable[[], Any]] = [
        parts_out_of_order, missing_part, no_part, other_cut, outside, early, twice_in_one_rank,
        lambda: engine.train_batch(own if rank else []), lambda: oracle.parts(7),
        lambda: engine.oracle([lso.MicroBatch(u.index, u.batch, idle=True) for u in own]),
    ]  # fmt: skip
    if world > 1:
        uses.append(at_the_wrong_rank)
    names = ["nothing to do", "too many parts", "no weight"]
    out = {}
    for use in uses:
        name = use.__name__ if use.__name__ != "<lambda>" else names.pop(0)
        try:
            use()
            out[name] = "nothing"
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    out["then"] = "trains" if engine.train_batch(own) > 0 else "does not"
    engines.close(engine)
    return out


def stopped(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> list[bool]:
    """`last_step.stop` after each of three steps; the last rank asks for it between the first and the second."""
    engine = engine_of(kind, zero, bf16, extra=(), method=lso.SAM())
    own = engines.mine(engines.batches(1, 3, dtype=dtype_of(kind, "fp32", bf16))[0])
    out = []
    for step in range(3):
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            engine.request_stop()
        engine.train_batch(own)
        assert engine.last_step
        out.append(engine.last_step.stop)
    engines.close(engine)
    return out


def batch_norm(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, Any]:
    """Batch norm in training mode is refused by name; with frozen statistics it trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(engines.FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, engines.CLASSES))
    engine = engines.build(kind, model, lso.SAM(), zero=zero, bf16=bf16)
    own = engines.mine(engines.batches(1, 3)[0])
    try:
        engine.train_batch(own)
        said = "nothing"
    except lso.UserError as error:
        said = str(error)
    engine.module.eval()
    out = {"said": said, "loss": engine.train_batch(own)}
    engines.close(engine)
    return out


def bad_batch_on_one_rank(kind: str, zero: dict[str, Any] | None = None, bf16: bool = False) -> dict[str, Any]:
    """One rank's batch holds no tensor, and every rank hears of it. It cuts the transport: run it in an own group."""
    engine = engine_of(kind, zero, bf16, extra=())
    own: list[Any] = engines.mine(engines.batches(1, 3, dtype=dtype_of(kind, "fp32", bf16))[0])
    engine.train_batch(own)
    start = time.monotonic()
    try:
        engine.train_batch(["no tensor"] if dist.get_rank() == 1 else own)
        said = "nothing"
    except Exception as error:
        said = str(error)
    return {"said": said, "seconds": time.monotonic() - start}
