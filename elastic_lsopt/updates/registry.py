"""Update rules by name: ours register themselves, others come by entry points in group `elastic_lsopt.updates`."""

from __future__ import annotations

from elastic_lsopt.by_name import Registry

_HOME = "elastic_lsopt.updates"
updates = Registry(
    "update",
    group="elastic_lsopt.updates",
    ours={
        **{
            name: f"{_HOME}.{name}"
            for name in ("adahessian", "adaptive_memory", "lamb", "lars", "muon", "sassha", "schedule_free", "soap")
        },
        **dict.fromkeys(("sophia_g", "sophia_h"), f"{_HOME}.sophia"),
    },
    defines=("update",),
)
register, names, get, build = updates.register, updates.names, updates.get, updates.build
