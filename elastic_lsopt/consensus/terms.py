"""What replicas must have alike to pull on each other: the rule, its hyper-parameters, the format, the parameters."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import fields

from elastic_lsopt.consensus.registry import rules
from elastic_lsopt.consensus.rule import Rule
from elastic_lsopt.errors import UserError
from elastic_lsopt.space.geometry import ParameterSpace

Terms = dict[str, str]
log = logging.getLogger("elastic_lsopt")


def terms_of(rule: Rule, space: ParameterSpace, *, bits: int, top_k: int | None) -> Terms:
    """Those of one replica, in words; `tau` is not among them, as a slow replica may take fewer steps."""
    told = {f.name: repr(getattr(rule, f.name)) for f in fields(rule) if f.init and f.name != "tau"}
    parameters = [(p.name, tuple(p.shape)) for p in space.layout.parameters]
    digest = hashlib.blake2b(repr(parameters).encode(), digest_size=4).hexdigest()
    trained = f"{len(parameters)} of {space.layout.numel} elements ({digest})"
    return {"rule": rules.name_of(type(rule)), **told, "bits": str(bits), "top_k": str(top_k), "parameters": trained}


def refuse_other_terms(terms: Mapping[int, Terms]) -> None:
    """Raise UserError where two of these replicas differ; the line names the first difference."""
    first = min(terms)
    for number, others in sorted(terms.items()):
        for key in dict.fromkeys([*terms[first], *others]):
            mine, theirs = terms[first].get(key), others.get(key)
            if mine != theirs:
                raise UserError(
                    f"replica {first} has {key}={mine} and replica {number} has {key}={theirs}; replicas pull on each "
                    "other by one rule and on the same trained parameters, so give all of them the same."
                )


def warn_of_other_beginnings(norms: Mapping[int, float]) -> None:
    """Say so where replicas whose weights have these norms have not begun from one model."""
    first, *others = sorted(norms)
    for number in others:
        if not math.isclose(norms[number], norms[first], rel_tol=1e-4):  # which is summed in another order
            log.warning(
                "replica %d has begun from other weights than replica %d (norms %.6g and %.6g): a mean of models that "
                "were drawn apart is none. Seed all replicas alike, or load the same weights; go on if each has come "
                "from its own checkpoint.", number, first, norms[number], norms[first],
            )  # fmt: skip
            return
