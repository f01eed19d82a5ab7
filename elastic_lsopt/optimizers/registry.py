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
        "gsam": f"{_HOME}.gsam",
        "looksam": f"{_HOME}.looksam",
        "friendly_sam": f"{_HOME}.friendly_sam",
        "wsam": f"{_HOME}.wsam",
        "momentum_sam": f"{_HOME}.momentum_sam",
        "m_sam": f"{_HOME}.m_sam",
        "esam": f"{_HOME}.esam",
        "ae_sam": f"{_HOME}.ae_sam",
        "sampa": f"{_HOME}.sampa",
        "random_sam": f"{_HOME}.random_sam",
        "functional_sam": f"{_HOME}.functional_sam",
        "lpf_sgd": f"{_HOME}.lpf_sgd",
        "rwp": f"{_HOME}.rwp",
        "entropy_sgd": f"{_HOME}.entropy_sgd",
        "flat_lora": f"{_HOME}.flat_lora",
        "nbar": f"{_HOME}.nbar",
        "bi_lora": f"{_HOME}.bi_lora",
    },
    defines=("parts", "init", "gradient"),
)
register, names, get, build = methods.register, methods.names, methods.get, methods.build
