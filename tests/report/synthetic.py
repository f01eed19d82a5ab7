"""A run folder with realistic content: a loss that falls, sharpness that rises to 2/η, a spectrum with outliers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 100_000
"""Weights of the imagined model."""
LAYERS = 6
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PARAMETERS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in PARTS),
    "model.norm.weight",
    "lm_head.weight",
]
OUTLIERS = (9.0, 12.5, 17.0, 38.0)
MEASURES = {
    "trace": 120.0, "frobenius": 45.0, "lpf": 2.1, "epsilon_sharpness": 3.0, "pac_bayes": 900.0, "fisher_rao": 14.0,
    "local_entropy": -2.4, "shannon_entropy": 1.9, "effective_dimension": 31.0, "sam_sharpness": 0.04,
    "gradient_norm": 0.6,
}  # fmt: skip
SETTINGS = ("width", "learning_rate")


def spectrum(outliers: tuple[float, ...], vectors: int = 4, nodes: int = 60, seed: int = 0) -> dict[str, Any]:
    """Ritz values of a bulk around zero, and outliers that every vector has found."""
    draw = np.random.default_rng(seed)
    found: dict[str, Any] = {"nodes": [], "weights": []}
    for _ in range(vectors):
        bulk = np.sort(draw.normal(0.0, 0.7, nodes)) + np.sort(draw.exponential(0.7, nodes))
        bulk = np.clip(bulk, -1.5, 6.0)
        mass = np.exp(-np.abs(bulk) / 0.4) + 1e-6
        mass *= (1 - len(outliers) / SIZE) / mass.sum()
        found["nodes"].append([*map(float, bulk), *outliers])
        found["weights"].append([*map(float, mass), *(float(draw.chisquare(1) / SIZE) for _ in outliers)])
    return found | {"dimension": SIZE, "products": vectors * nodes, "seconds": 12.5}


def plane(seed: int = 0) -> dict[str, Any]:
    """A bowl that is not round, with the way that led into it."""
    alphas, betas = np.linspace(-1, 1, 21), np.linspace(-1.2, 1.2, 17)
    losses = 2.1 + 6 * alphas**2 + 1.5 * betas[:, None] ** 2 + 1.2 * alphas * betas[:, None]
    losses += 0.15 * np.sin(7 * alphas) ** 2
    t = np.linspace(0, 1, 15)
    draw = np.random.default_rng(seed)
    path = np.stack([-0.9 * (1 - t) ** 2, 1.05 * (1 - t)], 1) + draw.normal(0, 0.02, (15, 2)) * (1 - t)[:, None]
    return {
        "alphas": alphas.tolist(), "betas": betas.tolist(), "losses": losses.tolist(), "centre": 2.1,
        "directions": "principal components", "path": path.tolist(), "forwards": 357, "seconds": 8.0,
    }  # fmt: skip


def probes(step: int, share: float, lr: float, *, parameters: list[str], seed: int) -> dict[str, Any]:
    """What the probes say once; `share` of training is over."""
    draw = np.random.default_rng(seed)
    top = [min(38.0, 6 + 60 * share) * s * draw.uniform(0.95, 1.05) for s in (1.0, 0.45, 0.32)]
    found: dict[str, Any] = {
        "top_eigenvalues": {
            "eigenvalues": top, "residuals": [1e-3 * v for v in top], "products": 45, "seconds": 3.2,
        },
        "edge_of_stability": {"value": top[0] * lr / 2, "sharpness": top[0], "threshold": 2 / lr, "products": 20},
        "noise_scale": {
            "value": 30 * np.exp(4 * share) * draw.uniform(0.8, 1.25), "standard_error": 10 * np.exp(4 * share),
            "critical_batch": 60 * np.exp(3 * share), "gradients": 1, "seconds": 0.5,
        },
        "trajectory": {
            "cosine": float(np.cos(1.2 + 0.9 * share)), "angle": 1.2 + 0.9 * share + draw.normal(0, 0.03),
            "angular_velocity": 0.02 + 0.01 * draw.uniform(), "distance_from_start": 9 * share**0.5,
            "path_length": 40 * share, "alignment": [0.2 + 0.6 * share, 0.3 * draw.uniform(), 0.2 * draw.uniform()],
            "update_to_weight": {
                name: float(1e-3 * np.exp(draw.normal(0, 0.7) - 2 * share)) for name in parameters
            },
        },
    }  # fmt: skip
    for name, value in MEASURES.items():
        noise = draw.normal(0, 0.03)
        found[name] = {
            "value": value * (1 + 0.5 * np.exp(-3 * share) + noise), "standard_error": abs(value) * 0.05,
            "products": 30, "seconds": 1.0,
        }  # fmt: skip
    found["gradient_norm"].pop("standard_error")
    return found


def steps(count: int = 400, every: int = 20, parameters: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    draw = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        share = step / count
        lr = 0.05 * min(1.0, share / 0.05)
        row: dict[str, Any] = {
            "generation": 0 if share < 0.5 else 1, "step": step, "samples": 32 * step,
            "loss": 2 + 3.5 / step**0.4 + draw.normal(0, 0.05), "lr": lr, "batch": 32, "world": 2 if share < 0.5 else 1,
            "seconds": 0.1,
        }  # fmt: skip
        if step % max(1, count // 8) == 0:
            row["eval_loss"] = 2.1 + 3.4 / step**0.4
        if step % every == 0:
            row["probes"] = probes(step, share, lr, parameters=parameters or PARAMETERS, seed=step)
        if step in (every, count) and step % every == 0:
            row["probes"]["spectral_density"] = spectrum(OUTLIERS if step == count else OUTLIERS[:2], seed=step)
        rows.append(row)
    if "probes" not in rows[-1]:
        return rows
    rows[-1]["probes"]["surface"] = plane()
    ts = np.linspace(0, 1, 21)
    rows[-1]["probes"]["mode_connectivity"] = {
        "ts": ts.tolist(), "line": (2.1 + 1.4 * np.sin(np.pi * ts) ** 2).tolist(),
        "curve": (2.1 + 0.12 * np.sin(np.pi * ts)).tolist(), "barrier": 1.4,
    }  # fmt: skip
    return rows


def exchanged(rows: list[dict[str, Any]], every: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """The same rows of replica `seed` of four, which meet every so many steps; all tell the same of a meeting."""
    out = [dict(row) for row in rows]
    for row in out:
        number, rest = divmod(row["step"], every)
        if rest:
            continue
        draw, own = np.random.default_rng(number), np.random.default_rng([number, seed])
        apart = (draw.uniform(0.8, 1.2, 4) / number**0.5).tolist()
        row["exchange"] = {
            "number": number, "members": [0, 1, 2, 3], "fit": [0, 1, 2, 3], "well": True, "seconds": 0.01,
            "sent_bytes": 4000, "consensus_distance": float(np.sqrt(np.mean(np.square(apart)))),
            "valley_width": float(np.mean(apart)), "distances": apart, "shares": [0.6, 0.3, 0.1], "effective_rank": 2.7,
            "span": 4, "gradient_share": float(own.uniform(0.1, 0.4)), "gradient_share_by_chance": 4 / SIZE,
        }  # fmt: skip
        if eigenvalues := row.get("probes", {}).get("top_eigenvalues"):
            beside = {"span": 4, "span_share": 0.3, "span_share_by_chance": 3 / SIZE, "energy_share": 0.25}
            row["probes"] = row["probes"] | {"top_eigenvalues": eigenvalues | {"disagreement": beside}}
    return out


CHANGES = [
    {"generation": 0, "samples": 0, "gone": [], "workers": ["a", "b"]},
    {"generation": 1, "samples": 6400, "gone": ["b"], "workers": ["a"]},
]


def study(models: int = 48) -> dict[str, Any]:
    """Measures that go with the gap more and less."""
    draw = np.random.default_rng(0)
    gaps = draw.uniform(0.02, 0.6, models)
    rows: list[dict[str, Any]] = [
        {"width": int(draw.choice([16, 32])), "learning_rate": 0.1, "gap": float(gap)} for gap in gaps
    ]
    measures = {}
    for i, name in enumerate(MEASURES):
        strength = 1.0 - 0.13 * i
        for row, gap in zip(rows, gaps, strict=True):
            row[name] = float(np.exp(4 * strength * gap + draw.normal(0, 0.5)))
        tau = 0.8 * strength
        measures[name] = {"tau": tau, "interval": [tau - 0.12, tau + 0.1], "models": models}
    return {"measures": measures, "models": rows}


def write_run(
    folder: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    changes: list[dict[str, Any]] | None = None,
    finished: dict[str, Any] | None = None,
    told: dict[str, Any] | None = None,
) -> Path:
    """A run folder of these files; `finished` becomes probes.json, `told` study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics.jsonl", rows), ("journal.jsonl", changes)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, content in (("probes.json", finished), ("study.json", told)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
