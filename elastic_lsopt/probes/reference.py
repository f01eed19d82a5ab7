"""The reference of the measures: `python -m elastic_lsopt.probes.reference` writes `docs/measures.md` anew."""

from __future__ import annotations

from pathlib import Path

import yaml

from elastic_lsopt.probes.catalogue import MEASURES, OURS, Measure

PAGE = Path(__file__).parents[2] / "docs/measures.md"
HEAD = """\
# Every measure and its settings

<!-- `make schema` writes this page from elastic_lsopt/probes/catalogue.py. -->

What `probes:` of a YAML file, `elastic-lsopt probe --measures` and `lso.ProbeCallback` can ask for, each with its
settings at their defaults. What it measures and what it costs: [probes.md](probes.md); ranges and errors: [the
functions](reference/probes.md).

```yaml
probes:
  top_eigenvalues: {every_steps: 100, k: 3, of: ggn}
  first_layer: {measure: trace, every_steps: 500, samples: 20, parameters: model.layers.0.*}
```

`of` is the matrix: hessian, ggn, or normalised (the Hessian in coordinates in which every filter has length 1).
`parameters` is a pattern of names, null for all. `basis_device: cpu` keeps vectors in host memory.

| measure | settings | needs |
|---|---|---|
"""
NEEDS = {
    "learning_rate": "a training", "initial": "the weights that the training began with", "branches": "a study",
    "other": "`elastic-lsopt probe --other MODEL`",
}  # fmt: skip
OF_JOBS = {"trajectory": ("{window: 40, align: 0}", "a job")}
"""What watches a run from its beginning is no measure of one point, so it is not in the catalogue."""


def measures_text() -> str:
    """The text of `docs/measures.md`."""
    rows = {name: (_settings(MEASURES[name]), NEEDS.get(MEASURES[name].needs or "", "")) for name in OURS} | OF_JOBS
    return "".join([HEAD, *(f"| `{name}` | `{own}` | {needs} |\n" for name, (own, needs) in sorted(rows.items()))])


def _settings(found: Measure) -> str:
    return yaml.safe_dump(dict(found.settings), default_flow_style=True, sort_keys=False, width=1000).strip()


if __name__ == "__main__":
    PAGE.write_text(measures_text(), encoding="utf-8")
