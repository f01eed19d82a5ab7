"""Averages by name: ours register themselves, a third party's come by entry points in group
`elastic_lsopt.averages`."""

from __future__ import annotations

from elastic_lsopt.by_name import Registry

averages = Registry(
    "average",
    group="elastic_lsopt.averages",
    ours={name: f"elastic_lsopt.averages.{name}" for name in ("ema", "swa", "lawa")},
    defines=("after_step", "weights"),
)
register, names, get, build = averages.register, averages.names, averages.get, averages.build
