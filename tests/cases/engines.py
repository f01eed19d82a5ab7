"""Models, batches and engines of every kind for the cases: small, uneven, and the same on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt.backends.detect import backend_for
from tests.oracles.paper_loops import cross_entropy

DEVICE = torch.device(os.environ.get("TESTS_ON", "cpu"))
"""Where models and batches are; `make test-gpu` says cuda."""
FRAMEWORK = ("plain", "ddp", "fsdp2", "fsdp2-kept", "fsdp2-offload", "hsdp")
ZERO = ("zero0", "zero1", "zero2", "zero3")
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "none": {},
    "sam": {"rho": 0.3},
    "asam": {"rho": 0.5, "eta": 0.01},
    "lpf_sgd": {"parts": 3, "gamma": 0.05, "alpha": 5.0},
    "flat_lora": {"sigma": 0.5},
    "gsam": {"rho": 0.3, "alpha": 0.4},
    "looksam": {"rho": 0.3, "k": 3, "alpha": 0.7},
    "friendly_sam": {"rho": 0.3, "sigma": 0.8, "decay": 0.6},
    "wsam": {"rho": 0.3, "gamma": 0.6, "decouple": True},
    "momentum_sam": {"rho": 0.3},
    "m_sam": {"rho": 0.3, "parts": 2},
    "esam": {"rho": 0.3, "beta": 0.6, "gamma": 0.5},
    "ae_sam": {"rho": 0.3, "decay": 0.5, "lambda1": -0.5, "lambda2": 0.5},
    "sampa": {"rho": 0.3, "lam": 0.3},
    "bi_lora": {"r": 3, "rho": 0.05},
    "nbar": {"alpha": {"start": 0.5, "end": 0.1}},
    "random_sam": {"rho": 0.3},
    "functional_sam": {"rho": 0.3},
    "rwp": {"gamma": 0.05, "alpha": 0.4},
    "entropy_sgd": {
        "inner_steps": 3, "gamma0": 0.5, "gamma1": 0.1, "noise": 1e-3, "inner_lr": 0.1, "inner_momentum": 0.9,
        "average": 0.75,
    },
}  # fmt: skip
SPLIT = lso.Loss(lambda model, b: model(b[0]), lambda z, b: cross_entropy(lambda _: z, b), lambda b: len(b[1]))
"""`cross_entropy` in its steps."""
FEATURES, CLASSES = 7, 3


class Net(nn.Module):
    """13 and 11 rows divide over no world size; `extra`: tied, frozen, unused parameters, dropout."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 13)
        self.second = nn.Linear(13, 11)
        self.norm = nn.LayerNorm(11)
        self.last = nn.Linear(11, CLASSES)
        self.tiny = nn.Parameter(torch.full((1,), 0.5))
        self.dropout = nn.Dropout(0.3 if "dropout" in extra else 0.0)
        if "unused" in extra:
            self.unused = nn.Linear(5, 3)
        if "frozen" in extra:
            self.second.requires_grad_(False)
        if "lora" in extra:
            self.requires_grad_(False)
            self.second = LowRank(self.second)
        if "tied" in extra:
            self.third = nn.Linear(13, 13)
            self.fourth = nn.Linear(13, 13)
            self.fourth.weight = self.third.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if hasattr(self, "third"):
            h = torch.tanh(self.fourth(torch.tanh(self.third(h))))
        h = self.dropout(torch.tanh(self.second(h)))
        return self.last(self.norm(h)) * self.tiny


class LowRank(nn.Module):
    """LoRA: a frozen layer, and a trainable product of rank 2 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Attending(nn.Module):
    """A layer as transformers have it: arguments by keyword, a tuple out, attention, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: Tensor, again: bool = False) -> tuple[Tensor, None]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        return x + self.dropout(torch.tanh(self.out(h))) * scale, None


class Transformer(nn.Module):
    """Three layers in a list, an embedding that is the head too (`tied`), weights of its own (`scale`)."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 4, 12)
        self.layers = nn.ModuleList(Attending(12, 0.3 if "dropout" in extra else 0.0) for _ in range(3))
        self.head = nn.Linear(12, CLASSES + 4, bias=False)
        self.scale = nn.Parameter(torch.full((1,), 0.7))
        if "tied" in extra:
            self.head.weight = self.embedding.weight
        if "frozen" in extra:
            self.layers[1].requires_grad_(False)
        if "lora" in extra:
            self.requires_grad_(False)
            for layer in self.layers:
                layer.qkv = LowRank(layer.qkv)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x, scale=self.scale)
        return self.head(x)


def transformer(extra: Sequence[str] = (), dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(extra).to(DEVICE, dtype)


def token_batches(units: int, *, size: int = 2, last: int | None = None, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """One global batch of `units` micro-batches of sequences of 5 tokens, and a class for each token."""
    torch.manual_seed(seed)
    sizes = [size] * (units - 1) + [last or size]
    tokens = [(torch.randint(0, CLASSES + 4, (n, 5)), torch.randint(0, CLASSES + 4, (n, 5))) for n in sizes]
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in tokens]


def net(extra: Sequence[str] = (), dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """`peft`: the same base at any seed, and adapters of peft's in its two first layers, of that seed; `adversary`: and
    Bi-LoRA's second ones."""
    if "peft" not in extra:
        torch.manual_seed(seed)
        return Net(extra).to(DEVICE, dtype)
    torch.manual_seed(0)
    model = Net([e for e in extra if e not in ("peft", "adversary")])
    second = HYPERPARAMETERS["bi_lora"]["r"] if "adversary" in extra else None
    adapt(model, seed=seed, adversary=second, target_modules=("first", "second"))
    return model.to(DEVICE, dtype)


def adapt(
    model: nn.Module, *, seed: int = 0, task: str = "classification", adversary: int | None = None, **lora: Any
) -> None:
    """Adapters as a job makes them, but with a product that is not zero."""
    from elastic_lsopt.config.lora import LoraConfig
    from elastic_lsopt.training.building.adapters import add_adapters

    add_adapters(model, LoraConfig(**{"r": 2, "alpha": 3.0, **lora}), task=task, seed=seed, adversary=adversary)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_B.default." in name:
            nn.init.normal_(p, std=0.5)


def batches(
    steps: int, units: int, *, size: int = 4, last: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[list[tuple[Tensor, Tensor]]]:
    """`steps` global batches of `units` micro-batches of `size` samples, the last one of `last`."""
    torch.manual_seed(seed)
    sizes = [size] * (units - 1) + [last or size]
    return [
        [(torch.randn(n, FEATURES).to(DEVICE, dtype), torch.randint(0, CLASSES, (n,)).to(DEVICE)) for n in sizes]
        for _ in range(steps)
    ]


def mine(units: Sequence[Any], deal: tuple[int, int] | None = None) -> list[Any]:
    """This rank's units, as the loader deals them (to an engine with that `deal`); a rank without gets a stand-in."""
    rank, world = deal or (dist.get_rank(), dist.get_world_size())
    own = [lso.MicroBatch(u, units[u]) for u in range(rank, len(units), world)]
    return own or [lso.MicroBatch(0, units[0], idle=True)]


def optimizer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    match name:
        case "sgd":
            return lambda params: torch.optim.SGD(params, lr=0.1)
        case "momentum":
            return lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)
        case "undecayed":
            return lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
        case "fused" | "capturable":
            return lambda params: torch.optim.AdamW(params, lr=1e-2, **{name: True})
        case _:
            return lambda params: torch.optim.AdamW(params, lr=1e-2)


def build(
    kind: str,
    model: nn.Module,
    method: Any,
    *,
    base: str | Callable[[Any], torch.optim.Optimizer] = "momentum",
    clip: float = 0.0,
    total_samples: int | None = None,
    loss_fn: Any = cross_entropy,
    zero: dict[str, Any] | None = None,
    bf16: bool = False,
    keep: Sequence[Any] = (),
    consensus: Any = None,
) -> lso.Engine:
    """An engine of that kind around `model` (which becomes the engine's own)."""
    make = optimizer(base) if isinstance(base, str) else base
    if loss_fn is cross_entropy and getattr(method, "needs_logits", False):
        loss_fn = SPLIT
    if kind.startswith("zero"):
        config = {
            "zero_optimization": {"stage": int(kind[4]), **offload(kind), **(zero or {})},
            "gradient_clipping": clip,
            "bf16": {"enabled": bf16},
        }
        return lso.initialize(
            model=model, config=config, method=method, base=make, loss_fn=loss_fn, total_samples=total_samples,
            keep=keep, consensus=consensus,
        )  # fmt: skip
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif kind != "plain":
        model = sharded(kind, model, bf16)
    named = (model.module if kind == "ddp" else model).named_parameters()
    backend = backend_for(model, make([(n, p) for n, p in named if p.requires_grad]), max_grad_norm=clip)
    return lso.Engine(backend, method, loss_fn=loss_fn, total_samples=total_samples, keep=keep, consensus=consensus)


def offload(kind: str) -> dict[str, Any]:
    """What DeepSpeed moves to the host: of `zero3-offload` the optimizer, of `zero3-offload-param` the weights too,
    of `zero3-offload-weights` these alone."""
    _, _, what = kind.partition("-offload")
    host = {"device": "cpu", "pin_memory": DEVICE.type == "cuda"}
    blocks = {
        "": ("offload_optimizer",),
        "-param": ("offload_optimizer", "offload_param"),
        "-weights": ("offload_param",),
    }
    return dict.fromkeys(blocks[what], host) if "-offload" in kind else {}


def sharded(kind: str, model: nn.Module, bf16: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    world = dist.get_world_size()
    if kind == "hsdp":
        replicas = 2 if world % 2 == 0 else 1
        mesh = init_device_mesh(DEVICE.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(DEVICE.type, (world,), mesh_dim_names=("shard",))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": kind != "fsdp2-kept"}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "fsdp2-offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda")
    children = [getattr(model, n) for n in ("first", "second") if hasattr(model, n)]
    for child in [*children, *getattr(model, "layers", ())]:
        fully_shard(child, **options)
    fully_shard(model, **options)
    return model


def whole(space: Any, vector: Any = None) -> dict[str, Tensor]:
    """A vector (None: the masters) by trainable parameter, whole, on every rank: gathered by offset."""
    layout = space.layout
    out = {p.name: torch.zeros(p.numel, dtype=space.dtype, device=DEVICE) for p in layout.parameters}
    seen = {name: torch.zeros_like(t) for name, t in out.items()}
    for piece, t in zip(layout.pieces, (vector or space.weights).tensors, strict=True):
        name = layout.parameters[piece.parameter].name
        out[name][piece.offset : piece.offset + piece.length] = t.to(space.dtype)
        seen[name][piece.offset : piece.offset + piece.length] = 1
    for p in layout.parameters:
        dist.all_reduce(out[p.name])
        dist.all_reduce(seen[p.name])
        assert bool((seen[p.name] > 0).all()), f"no rank holds some element of {p.name}"
        out[p.name] = (out[p.name] / seen[p.name]).view(p.shape)
    return out


def furthest(space: Any, model: nn.Module) -> float:
    """max |dw| between the space's weights and a plain model's."""
    ours, plain = whole(space), dict(model.named_parameters())
    return max(float((ours[n].double() - plain[n].detach().double()).abs().max()) for n in ours)


def close(engine: lso.Engine) -> None:
    """Free what the next case must not meet."""
    if engine.backend.name.startswith("zero"):
        engine.backend.engine.destroy()  # type: ignore[attr-defined]
