"""Rules of consensus by name: ours register themselves, others come by entry points in group
`elastic_lsopt.consensus`."""

from __future__ import annotations

from elastic_lsopt.by_name import Registry

_HOME = "elastic_lsopt.consensus"
rules = Registry(
    "rule of consensus",
    group="elastic_lsopt.consensus",
    ours={
        **{
            name: f"{_HOME}.{name}"
            for name in (
                "local_sgd",
                "easgd",
                "eamsgd",
                "parle",
                "lsgd",
                "al_dsgd",
                "dppf",
                "lsam",
                "diloco",
                "streaming_diloco",
                "muloco",
                "sparseloco",
            )
        },
        **dict.fromkeys(("mgrawa", "lgrawa"), f"{_HOME}.grawa"),
    },
    defines=("exchange", "settle"),
)
register, names, get, build = rules.register, rules.names, rules.get, rules.build
