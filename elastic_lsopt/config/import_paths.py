"""The import paths that a job's settings name: code that runs when it is imported."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_lsopt.config.probes import read_probes
from elastic_lsopt.config.settings import TrainConfig


def import_paths(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, "package.module:name") of each."""
    named = [("model.import", (config.model or {}).get("import"))]
    named += [(f"landscape.{key}", config.landscape.get(key)) for key in ("import", "method")]
    named += [("optim", config.optim), ("compute_metrics", config.compute_metrics)]
    named += [(f"param_groups[{i}].optim", group.get("optim")) for i, group in enumerate(config.param_groups)]
    named += [(f"averages.{name}.import", given.get("import", name)) for name, given in config.averages.items()]
    named += [(f"probes.{name}.measure", probe.measure) for name, probe in read_probes(config.probes).items()]
    named += [("consensus.rule", (config.consensus or {}).get("rule"))]
    yield from ((key, path) for key, path in named if isinstance(path, str) and ":" in path)
