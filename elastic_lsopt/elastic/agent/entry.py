"""What a worker is told of the generation that it enters, in words that the link carries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from elastic_lsopt.backends.fabric.signed_store import derived
from elastic_lsopt.elastic.membership.generation import Generation
from elastic_lsopt.elastic.worker.link import NOWHERE


def told_of(generation: Generation, worker: str, place: int, secret: bytes) -> dict[str, Any]:
    """Who is there and why, the secret of the group that forms, and in a job of several replicas which group that is.

    `place` is the worker's on its node; `secret` is the job's.
    """
    told = {
        "number": generation.number, "workers": [w for _, w in generation.ranks],
        "nodes": [n for n, _ in generation.ranks], "why": generation.why, "running": generation.running,
    }  # fmt: skip
    if not generation.replicas:
        return {**told, "secret": derived(secret, "workers", str(generation.number)).hex()}
    own = next((k for k, r in enumerate(generation.replicas) if worker in r.workers), NOWHERE)
    since = generation.number if own == NOWHERE else generation.replicas[own].since
    hosted = generation.store_since
    return {
        **told, "secret": derived(secret, "workers", str(since), str(own)).hex(), "replica": own,
        "replicas": [asdict(r) for r in generation.replicas], "place": place, "store_since": hosted,
        "meetings": derived(secret, "meetings", str(hosted)).hex(),
    }  # fmt: skip
