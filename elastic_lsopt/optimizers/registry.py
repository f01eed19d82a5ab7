"""Methods by name: ours register themselves, a third party's come by entry points in group `elastic_lsopt.methods`."""

from __future__ import annotations

from elastic_lsopt.by_name import Registry

_HOME = "elastic_lsopt.optimizers"
methods = Registry(
    "method",
    group="elastic_lsopt.methods",
    ours={
        "none": f"{_HOME}.plain",
        "sam": f"{_HOME}.sam",
        "asam": f"{_HOME}.asam",
        "lpf_sgd": f"{_HOME}.lpf_sgd",
        "flat_lora": f"{_HOME}.flat_lora",
    },
    defines=("parts", "init", "gradient"),
)
register, names, get, build = methods.register, methods.names, methods.get, methods.build
