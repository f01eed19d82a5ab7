"""The clock by which leases and promises run."""

from __future__ import annotations

import time


def lease_now() -> float:
    """Seconds since this machine's boot, those included in which it was suspended (Linux's CLOCK_BOOTTIME).

    `time.monotonic` stands still while a virtual machine is suspended: after it an agent would believe in a lease that
    the others have seen end, and its workers would train beside theirs.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)
