"""The `probes:` block: what is measured during training, how often, and how much of the time that may take.

    probes:
      top_eigenvalues: {every_steps: 100, k: 3}
      trace_of_the_first_layer: {measure: trace, every_samples: 20000, parameters: "model.layers.0.*", samples: 20}

      mine: {import: "my_probes:rank_of_a_layer", every_steps: 10, layer: 3}

Keys that are not named here are the measure's own settings. Who knows the measures checks their names and the keys'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.ranges import BLOCK, Count, Name, SettingError
from elastic_lsopt.config.spelling import did_you_mean

TRAJECTORY = "trajectory"
"""The one measure that watches the run from its beginning instead of one point of it."""


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class ProbeConfig:
    """One probe of a job. Exactly one of `every_steps` and `every_samples`."""

    measure: Name | None = None
    """The measure, or the import path of a probe of your own; null: the probe's own name."""
    every_steps: Count | None = None
    """Optimizer steps between two measurements."""
    every_samples: Count | None = None
    """Committed samples between two measurements: the same points of the run at any batch size."""
    budget: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.1
    """Largest share of the run's time that this probe may take, in (0, 1]: measurements beyond it are left out."""
    units: Count = 4
    """Micro-batches of per_device_train_batch_size training samples that it is measured on, always the same."""
    products: Literal["auto", "kept", "rebuilt", "blockwise", "differences"] = "auto"
    """How curvature is multiplied with vectors; auto: by the memory there is."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The measure's own settings."""

    def due(self, before: tuple[int, int], after: tuple[int, int]) -> bool:
        """Whether a step from (steps, samples) to (steps, samples) has passed one of its points."""
        which, every = (0, self.every_steps) if self.every_steps is not None else (1, self.every_samples)
        assert every is not None
        return before[which] // every != after[which] // every


OWN = tuple(name for name in ProbeConfig.__dataclass_fields__ if name != "settings")


def read_probes(block: Mapping[str, Any]) -> dict[str, ProbeConfig]:
    """The probes by name. Raises SettingError, with the key, for a value that cannot stand."""
    return {name: _probe(f"probes.{name}", name, given) for name, given in block.items()}


def _probe(key: str, name: str, given: Any) -> ProbeConfig:
    if not isinstance(given, Mapping):
        raise SettingError(key, f"{key}={given!r} must be a mapping, such as {{every_steps: 100}}.")
    if "import" in given and "measure" in given:
        raise SettingError(f"{key}.import", f"{key} needs one of measure and import.")
    given = {"measure" if k == "import" else k: v for k, v in given.items()}
    own = {k: v for k, v in given.items() if k in OWN}
    settings = {k: v for k, v in given.items() if k not in OWN}
    if (own.get("every_steps") is None) == (own.get("every_samples") is None):
        raise SettingError(key, f"{key} needs exactly one of every_steps and every_samples.")
    for k in settings:
        if k.startswith("every"):
            raise SettingError(f"{key}.{k}", f"{key} has no key {k!r}{did_you_mean(k, OWN)}")
    try:
        return TypeAdapter(ProbeConfig).validate_python({"measure": name, **own, "settings": settings})
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"][0]
        wish = first["msg"].removeprefix("Input should be ")
        raise SettingError(f"{key}.{place}", f"{key}.{place}={first['input']!r} must be {wish}.") from None
