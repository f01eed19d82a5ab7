"""An agent's votes on disk, also where the disk is full or gone for a while.

See [Note: a disk that cannot be written] in membership.py.
"""

from __future__ import annotations

import logging

from elastic_lsopt.elastic.agent.node_folder import NodeFolder
from elastic_lsopt.elastic.membership.record import Remembered

log = logging.getLogger("elastic_lsopt")
AGAIN_S = 0.5
"""How long a disk that could not be written is left alone."""


class VoteDisk:
    """Writes what an agent must not forget; says when that begins to fail, and when it works again."""

    def __init__(self, folder: NodeFolder) -> None:
        self._folder = folder
        self._again_s = 0.0
        self.fault = ""
        """Why the newest vote could not be written; "" where it was."""

    def may_vote(self, now: float) -> bool:
        """False while the last failure is too fresh to try again."""
        return now >= self._again_s

    def write(self, remembered: Remembered, now: float) -> bool:
        """Whether it is on disk."""
        try:
            self._folder.remember(remembered.to_json())
        except OSError as error:
            fault, self._again_s = error.strerror or str(error), now + AGAIN_S
            if fault != self.fault:
                self.fault = fault
                log.warning(
                    "%s: %s cannot be written (%s), so this node gives no vote: its workers go on, and a change of "
                    "members may have to wait. It tries again; make room there.",
                    self._folder.name, self._folder.path, fault,
                )  # fmt: skip
            return False
        if self.fault:
            log.warning("%s: %s can be written again; this node votes.", self._folder.name, self._folder.path)
            self.fault = ""
        return True

    def forget(self) -> None:
        """The job has ended here; a file that cannot be removed is named, because it would bind a later job."""
        try:
            self._folder.forget()
        except OSError as error:
            log.warning(
                "%s: its files in %s cannot be removed (%s); remove them before another job begins there.",
                self._folder.name, self._folder.path, error.strerror,
            )  # fmt: skip
