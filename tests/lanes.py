"""Two kinds of lanes for `pytest -n`: one for files whose tests mostly wait, the others for what computes.

Jobs that are killed and healed wait for leases, timeouts and pauses, and some of their tests say within how many
seconds something must have happened. So one lane runs those files alone, one after another, while the others compute
behind it at a lower priority: the cores are in use, and a test that looks at a clock gets one when it needs it. A lane
that has nothing left of its own takes of the others'.
"""

from __future__ import annotations

import os
from typing import Any

from xdist.scheduler import LoadFileScheduling

WAITING = {
    "tests/cli/elastic/test_elastic_updates.py": 30,
    "tests/cli/elastic/test_elastic_launchers.py": 120, "tests/cli/elastic/test_elastic_train.py": 110,
    "tests/chaos/test_partition.py": 90, "tests/cli/elastic/test_elastic_bad_input.py": 65,
    "tests/cli/elastic/test_elastic_hang.py": 55, "tests/test_examples.py": 50, "tests/cli/test_status.py": 45,
    "tests/study/test_pool.py": 22, "tests/chaos/test_chaos.py": 35, "tests/cli/elastic/test_elastic_hsdp.py": 30,
    "tests/elastic/worker/test_last_step.py": 25, "tests/cli/elastic/test_elastic_speeds.py": 25,
    "tests/chaos/test_witness_job.py": 25, "tests/processes/test_ranks.py": 25,
    "tests/cli/elastic/test_elastic_scale_batch.py": 20,
    "tests/elastic/worker/test_elastic_loop.py": 10, "tests/cli/elastic/test_elastic_other_data.py": 10,
    "tests/chaos/test_replicas.py": 40, "tests/consensus/test_elastic_jobs.py": 30,
    "tests/data/test_order.py": 5, "tests/launch/test_shell.py": 15,
}  # fmt: skip
"""Files of the first lane, with about how many seconds they take."""
LONG = {
    "tests/backends/test_zero.py": 155, "tests/oracle/test_products.py": 115, "tests/benchmarks/test_benchmarks.py": 95,
    "tests/study/test_whole_study.py": 80, "tests/cli/test_probe.py": 70, "tests/elastic/memory/test_reshard.py": 65,
    "tests/cli/test_train.py": 65, "tests/report/test_page.py": 60,
    "tests/elastic/membership/test_membership_search.py": 55,
    "tests/cli/test_launchers.py": 55, "tests/space/test_noise.py": 55, "tests/data/test_loader.py": 55,
    "tests/probes/spectrum/test_lanczos.py": 55, "tests/cli/test_probes_in_a_job.py": 50,
    "tests/probes/flatness/test_flatness_ranks.py": 45, "tests/checkpoint/test_resume.py": 45,
    "tests/laws/test_reference.py": 40, "tests/training/test_loop.py": 40, "tests/optimizers/test_extra_memory.py": 35,
    "tests/training/test_engines.py": 35, "tests/laws/test_cover.py": 30, "tests/cli/test_bad_input.py": 30,
    "tests/docs/test_tutorial.py": 25, "tests/api/test_landscape_trainer.py": 30, "tests/laws/test_return.py": 25,
    "tests/oracle/test_oracle.py": 25,
}  # fmt: skip
"""Others that are begun early, so that no lane is left alone with them at the end; a file that is not named takes a
fifth of a second a test."""
NICE = 10


class Lanes(LoadFileScheduling):
    """A file is one unit of work; each lane begins with the longest of its kind."""

    def _assign_work_unit(self, node: Any) -> None:
        first = node.gateway.id == "gw0"

        def order(file: str) -> tuple[bool, float]:
            seconds = WAITING.get(file, 0) or LONG.get(file, 0.2 * len(self.workqueue[file]))
            return (file in WAITING) == first, seconds

        # Of the other kind the shortest: its own lane is at the longest.
        mine = [file for file in self.workqueue if order(file)[0]]
        chosen = max(mine, key=order) if mine else min(self.workqueue, key=order)
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)


def enter(worker: str) -> None:
    """Called in each lane's own process, before it collects."""
    if worker != "gw0":
        os.nice(NICE)
