"""The measures of a study: those of the one catalogue that are a number, by the catalogue's names.

Each is larger where the minimum is thought sharper or the network more complex, at the weights where the network has
ended, on the loss of the whole training set.
"""

from __future__ import annotations

from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.config.study import StudyConfig
from elastic_lsopt.errors import UserError
from elastic_lsopt.probes.catalogue import MEASURES, measure
from elastic_lsopt.probes.presets import STUDIED

KNOWN = ("initial", "branches")
"""What a study knows of the training around a network."""
NO_NUMBER = ("surface", "spectral_density", "noise_scale")


def chosen(config: StudyConfig) -> tuple[str, ...]:
    """The measures of a study. Raises SettingError, with the nearest name, for one that it does not have, and for one
    that is no number."""
    for name in config.measures or ():
        if name in NO_NUMBER:
            raise SettingError(
                "measures", f"measure {name!r} is not one number, so nothing can be ranked by it; remove it."
            )
        if name not in MEASURES:
            known = [each for each in MEASURES if each not in NO_NUMBER]
            raise SettingError("measures", f"measure {name!r} is unknown{did_you_mean(name, known)}")
        try:
            measure(name, {}, KNOWN)
        except UserError as error:
            raise SettingError("measures", str(error)) from None
    return config.measures or STUDIED
