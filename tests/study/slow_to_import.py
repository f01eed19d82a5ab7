"""A task whose module takes longer to import than the task."""

import multiprocessing
import time

if multiprocessing.current_process().name != "MainProcess":
    time.sleep(2.5)


def at_once(task: str) -> str:
    return task
