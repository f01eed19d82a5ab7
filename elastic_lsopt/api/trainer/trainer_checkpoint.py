"""The part of a Trainer's checkpoint folder that is ours: weights, optimizer and method by parameter name.

    checkpoint-20/model.safetensors, trainer_state.json, scheduler.pt, rng_state.pth …      the Trainer's own
    checkpoint-20/landscape/checkpoint-20/                                                  as `lso.save` writes it

It stands in place of what the Trainer, accelerate or DeepSpeed would write of the optimizer, which fits one world size
or one backend; this can be resumed at any, and nothing of it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from elastic_lsopt.checkpoint.contents import TrainingState
from elastic_lsopt.checkpoint.save import load, save
from elastic_lsopt.errors import UserError

FOLDER, SCHEDULE = "landscape", "schedule"


def portable_part(checkpoint: str | Path | None) -> Path | None:
    """Our part of a checkpoint folder; None where it has none (the stock Trainer has written it)."""
    part = None if checkpoint is None else Path(checkpoint) / FOLDER
    return part if part is not None and part.is_dir() else None


def has_weights(checkpoint: str | Path) -> bool:
    """Whether the folder holds weights as `save_pretrained` writes them."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
    return any((Path(checkpoint) / name).exists() for name in names)


@contextmanager
def resumable(model: Any, args: Any) -> Iterator[None]:
    """While a Trainer is made of a model that transformers has sharded on reading: it refuses to save what it cannot
    resume itself, unless it is told to save no more than the model. Ours can be resumed."""
    refused = getattr(model, "is_distributed_loading_by_transformers", False) and not getattr(
        args, "save_only_model", True
    )
    if refused:
        args.save_only_model = True
    try:
        yield
    finally:
        if refused:
            args.save_only_model = False


def save_portable(state: TrainingState, checkpoint: str | Path, schedule: dict[str, Any]) -> None:
    """Write our part of the folder, the learning-rate schedule's numbers with it (collective).

    Raises UserError where it cannot be written.
    """
    save(state, Path(checkpoint) / FOLDER, extra={SCHEDULE: {k: v for k, v in schedule.items() if _outlives_json(v)}})


def load_portable(state: TrainingState, part: Path) -> dict[str, Any]:
    """Go on from it (collective); what was saved of the schedule. Raises UserError for a damaged one, and for one of
    another model."""
    report = load(state, part)
    if report is None:
        raise UserError(f"{part} holds no checkpoint (it was not finished); resume from another one.")
    return report.extra.get(SCHEDULE, {})


def _outlives_json(value: Any) -> bool:
    """What a schedule counts does. What does not is what it was built from (functions, milestones by step)."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
