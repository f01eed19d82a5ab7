"""A task for a process whose parent dies."""

import os
import time
from pathlib import Path


def say_and_wait(target: str) -> None:
    """Write this process's id, then wait."""
    Path(target).write_text(str(os.getpid()))
    time.sleep(60)
