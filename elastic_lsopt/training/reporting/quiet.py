"""A job's log is ours alone: what other libraries warn of and their bars stay away, their reports come once.

A user who gives `python -W`, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY or HF_HUB_DISABLE_PROGRESS_BARS gets what they say.
"""

from __future__ import annotations

import os
import sys
import warnings

VERBOSITY, NO_BARS = "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"
_asked = VERBOSITY in os.environ


def silence_libraries() -> None:
    """For a process of a job, before it imports the libraries that it needs."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault(NO_BARS, "1")


def report_loads(speaks: bool) -> None:
    """Whether this process shows what transformers reports of a model that it loads: weights left out, or made anew."""
    if _asked:
        return
    os.environ[VERBOSITY] = "warning" if speaks else "error"
    if "transformers" in sys.modules:
        from transformers.utils import logging

        (logging.set_verbosity_warning if speaks else logging.set_verbosity_error)()
