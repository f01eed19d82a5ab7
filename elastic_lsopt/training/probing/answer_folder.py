"""Where an answer of `elastic-lsopt probe` goes: a folder of its own, in the run that was asked about.

runs/NAME/probes/probe-1/probes.json, probe-2/…      of a checkpoint or a model of runs/NAME
runs/probe/probe-1/probes.json, probe-2/…            of a saved model that lies in no run
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from elastic_lsopt.errors import UserError
from elastic_lsopt.report.run import ANSWERS
from elastic_lsopt.training.reporting.run_folder import CONFIG, METRICS, MODEL

NO_RUN = Path("runs/probe")
"""Where answers about models of no run go, below the working folder."""
_NAME = re.compile(r"probe-(\d+)")


def run_of(checkpoint: Path) -> Path:
    """The folder two above a checkpoint, seen from the working folder too: `checkpoint-4` may lie in it."""
    near = checkpoint.parent.parent
    return near if (near / CONFIG).is_file() else Path(os.path.abspath(checkpoint)).parent.parent


def answers_folder(model: Path, checkpoint: Path | None, output: Path | None) -> Path:
    """The folder of all answers of a kind: `output`, else the run's own, else NO_RUN."""
    if output is not None:
        return output
    if checkpoint is not None:
        return run_of(checkpoint) / ANSWERS
    whole = Path(os.path.abspath(model))
    run = model.parent if model.parent != model else whole.parent
    is_export = whole.name == MODEL and (run / CONFIG).is_file() and (run / METRICS).is_file()
    return run / ANSWERS if is_export else NO_RUN


def claimed(answers: Path) -> Path:
    """`answers/probe-N`, made for one answer alone, also where others ask at the same time; N counts up.

    Raises UserError where it cannot be made.
    """
    try:
        answers.mkdir(parents=True, exist_ok=True)
        number = max((int(found[1]) for p in answers.iterdir() if (found := _NAME.fullmatch(p.name))), default=0)
        while True:
            number += 1
            with suppress(FileExistsError):  # another has taken it since
                (answers / f"probe-{number}").mkdir()
                return answers / f"probe-{number}"
    except OSError as error:
        raise unwritable(answers, error) from error


def unwritable(folder: Path, error: OSError) -> UserError:
    """What a user is told of a place that takes no answer."""
    return UserError(f"{folder} cannot be written: {error.strerror}; name another folder by --output FOLDER.")


def drawn_by(folder: Path) -> Path:
    """What `elastic-lsopt report` is to be given for an answer: the run that it lies in, else its own folder."""
    run = folder.parent.parent
    return run if folder.parent.name == ANSWERS and (run / CONFIG).is_file() else folder
