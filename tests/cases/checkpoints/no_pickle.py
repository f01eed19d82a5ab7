"""A case that listens for pickles while ranks save, resume and export."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

import elastic_lsopt as lso
from elastic_lsopt.checkpoint import Checkpointer
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from tests.cases import engines


def checkpoint_and_export(path: str) -> list[str]:
    """Who took an object of another rank out of a pickle, as file and line of this package."""
    seen: list[str] = []
    c10d: Any = dist.distributed_c10d
    original = c10d._tensor_to_object

    def noted(*arguments: Any, **more: Any) -> Any:
        ours = [f for f in traceback.extract_stack() if "elastic_lsopt/" in f.filename]
        seen.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere")
        return original(*arguments, **more)

    c10d._tensor_to_object = noted
    try:
        engine = engines.build("fsdp2", engines.net(), lso.SAM(rho=0.3))
        engine.train_batch(engines.mine(engines.batches(1, 2)[0]))
        checkpoints = Checkpointer(path)
        checkpoints.save(engine, 1)
        report = checkpoints.wait()
        assert report is not None and report.error is None, report
        assert checkpoints.resume(engine) is not None
        checkpoints.close()
        export_huggingface(engine.backend, engine.module, Path(path) / "export")
        engines.close(engine)
    finally:
        c10d._tensor_to_object = original
    return seen
