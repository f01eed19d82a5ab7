"""What each figure must reach (the project's own limits); figures without a line here are reported only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.imports import COMMANDS
from benchmarks.plan_memory import SETTINGS as PLANNED
from benchmarks.replicas import deaths, plain_steps, traffic
from benchmarks.step.rules import BACKENDS, RULES


@dataclass(frozen=True)
class Target:
    """A limit on one figure of one benchmark: `at_most` or `at_least`."""

    benchmark: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def reached(self, value: float, spread: tuple[float, float]) -> str:
        """yes; no; or within the spread: the median misses the limit and its quartile towards the limit does not."""
        if self._holds(value):
            return "yes"
        return "within the spread" if self._holds(spread[0 if self.at_most is not None else 1]) else "no"

    def _holds(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)

    def __str__(self) -> str:
        return f"≤ {self.at_most:,g}" if self.at_most is not None else f"≥ {self.at_least:,g}"


MOST = {"momentum_sam_fsdp2": 1.03, "momentum_sam_zero2": 1.03, "lpf_sgd_zero3": 1.10}
"""Of its passes, where the limit is not 1.05."""
SCRATCH_BYTES = 4 * 2**20
"""The bounded scratch that counts as none: a move in fp32 reaches narrower weights through a chunk of this size."""

TARGETS = (
    *(
        Target("steps", f"{name}_of_its_passes", at_most=MOST.get(name, 1.05))
        for rule in RULES
        for name in (f"{rule.name}_{backend}" for backend in rule.backends)
    ),
    *(Target("steps", f"looksam_{b}_of_base_step", at_most=1.30) for b in BACKENDS),
    *(Target("steps", f"functional_sam_{b}_of_sam", at_most=1.10) for b in BACKENDS),
    *(Target("trainer", f"sam_{place}_of_two_trainer_steps", at_most=1.05) for place in ("one_process", "ddp")),
    *(Target("trainer", f"none_{place}_of_trainer_step", at_most=1.01) for place in ("one_process", "ddp")),
    Target("one_process", "sam_engine_of_pytorch_optimizer", at_most=1.0),
    Target("one_process", "sam_landscape_optimizer_of_pytorch_optimizer", at_most=1.0),
    Target("memory", "displaced_fsdp2_fp32_of_fp32_shard", at_most=1.0001),  # a shard, and a few numbers
    Target("memory", "sam_fsdp2_fp32_extra_of_fp32_shard", at_most=1.0001),
    *(
        Target("memory", f"sam_{b}_extra_bytes", at_most=SCRATCH_BYTES)
        for b in ("zero1_bf16", "zero2_fp32", "zero2_bf16", "zero3_bf16")
    ),
    Target("curvature", "product_kept_of_gradient", at_most=2.3),
    Target("curvature", "product_rebuilt_of_gradient", at_most=3.1),
    Target("curvature", "product_blockwise_of_gradient", at_most=4.5),
    Target("curvature", "product_kept_fsdp2_of_gradient", at_most=2.6),
    Target("curvature", "product_blockwise_fsdp2_of_gradient", at_most=4.5),
    *(
        Target("curvature_spectra", f"top5_{peer}_of_ours", at_least=2.0)
        for peer in ("hessian_eigenthings", "pyhessian")
    ),
    Target("curvature_spectra", "top5_ours_largest_residual", at_most=1e-3),
    Target("curvature_spectra", "spectral_density_hessian_eigenthings_of_ours", at_least=1.3),
    Target("curvature_memory", "blockwise_peak_world2_of_world1", at_most=0.65),
    Target("curvature_memory", "vector_bytes_world2_of_world1", at_most=0.505),
    Target("elastic", "kill_worker_fsdp2_small_s", at_most=0.5),
    Target("elastic", "kill_worker_fsdp2_60mb_s", at_most=1.0),
    *(Target("elastic", f"kill_worker_{b}_small_s", at_most=1.5) for b in ("zero2", "zero3")),
    Target("elastic", "kill_worker_fsdp2_small_steps_done_again", at_most=1),
    Target("elastic", "join_pause_fsdp2_small_s", at_most=0.7),
    Target("elastic", "torchrun_kill_node_of_our_kill", at_least=10.0),
    Target("elastic_agent", "main_us_per_record_of_1000", at_most=25.0),
    Target("elastic_layer", "layer_of_step_without_mirror", at_most=0.01),
    Target("elastic_layer", "layer_of_step_with_mirror", at_most=0.03),
    *(
        Target("membership_simulation", f"{change}_store_operations_per_worker_of_10000_over_100", at_most=1.1)
        for change in ("join", "worker_death", "node_silence", "host_death")
    ),
    *(Target("adapters", f"flat_lora_{b}_of_lora_step", at_most=1.10) for b in ("ddp", "fsdp2", "zero2")),
    *(Target("updates", f"{name}_zero2_step_of_adamw", at_most=1.10) for name in ("lars", "lamb")),
    Target("updates", "muon_own_step_of_torch_on_one", at_most=0.65),  # 1/N + 0.15 on two ranks
    Target("updates", "ema_zero2_step_of_base", at_most=1.02),
    *(Target("updates", f"{name}_zero2_bytes_of_fp32_shard", at_most=1.0001) for name in ("ema", "swa")),
    Target("updates", "lawa_zero2_bytes_of_fp32_shard", at_most=2.0001),  # a copy each that it holds
    Target("updates", "adamw_own_step_of_torchs_fused", at_most=1.2),
    Target("updates", "soap_own_step_of_the_authors", at_most=1.1),
    *(
        Target("loading", f"peak_{kind}_world{world}_of_shard_and_block", at_most=0.9)
        for kind in ("fsdp2", "zero3")
        for world in (2, 4)
    ),
    *(Target("large_model", f"load_{kind}_world2_of_safetensors", at_most=1.5) for kind in ("fsdp2", "zero3")),
    *(Target("loading", f"export_{kind}_world2_extra_bytes", at_most=64 * 2**20) for kind in ("fsdp2", "zero3")),
    Target("loading", "limited_host_load_passes", at_least=1),
    Target("loading", "limited_host_whole_copies_pass", at_most=0),
    Target("large_model", "sam_1_3b_two_workers_bytes", at_most=20 * 2**30),
    *(Target("plan_memory", f"{name}_off", at_most=0.1) for name in PLANNED),
    *(Target("replica_simulation", f"{n}_replicas_simulated_seconds_off", at_most=0.1) for n in (2, 3, 4)),
    *(Target("replica_simulation", f"goodput_consensus_100000_replicas_of_{n}_gpus", at_least=0.88) for n in (1, 12)),
    Target("replica_simulation", "simulating_100000_replicas_of_1_gpus_s", at_most=10),
    *(Target("replica_deaths", f"{name}_cost_s", at_most=limit) for name, limit in deaths.limits()),
    Target("replica_deaths", "worst_again_s", at_most=deaths.AT_ONCE_S),
    Target("replica_deaths", "kills", at_least=100),
    Target("replica_deaths", "averaged_by_halves", at_most=0),
    *(Target("replica_traffic", f"{name}_wire_of_paper", at_most=1.1) for name in traffic.NAMES),
    *(
        Target("replica_traffic", f"{name}_collectives", at_most=1)
        for name in traffic.NAMES
        if name != "al_dsgd"  # a message to each neighbour
    ),
    *(
        Target("replica_steps", f"{rule}_{kind}_of_plain_step", at_most=1.02)
        for kind in plain_steps.KINDS
        for rule in plain_steps.RULES
    ),
    Target("replica_streaming", "hidden_share", at_least=0.8),
    Target("replica_slow_link", "8_samples_throughput_of_synchronous", at_least=1.5),
    Target("replica_slow_link", "hang_cost_of_deadline", at_most=1.0),
    Target("replica_slow_link", "hang_again_of_deadline", at_most=0.1),
    *(Target("replica_few_bits", f"{task}_2_bits_bytes_of_synchronous", at_most=0.01) for task in ("digits", "lm")),
    *(Target("replica_few_bits", f"{task}_2_bits_loss_beyond_interval", at_most=0.0) for task in ("digits", "lm")),
    Target("imports", "import_beyond_torch_s", at_most=0.3),
    *(Target("imports", f"help{c and '_' + c}_beyond_python_s", at_most=0.3) for c in COMMANDS),
    Target("noise", "cpu_fill_speed_of_randn", at_least=0.5),
    *(
        Target("noise", f"gpu_{kind}_{dtype}_of_copy_bandwidth", at_least=0.7)
        for kind in ("add", "add_by_row")
        for dtype in ("float32", "bfloat16")
    ),
)  # fmt: skip


def rows(benchmark: str, figures: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(figure, value, spread, target, reached) of each number of a benchmark, those with a target first."""
    targets = {t.figure: t for t in TARGETS if t.benchmark == benchmark}
    out = []
    for name in sorted((n for n, v in figures.items() if _number(v)), key=lambda n: n not in targets):
        value, target = figures[name], targets.get(name)
        low, high = figures.get(f"{name}_spread", (value, value))
        spread = f"{show(low)} to {show(high)}" if f"{name}_spread" in figures else "-"
        out.append(
            (
                name,
                show(value),
                spread,
                str(target or "-"),
                target.reached(value, (low, high)) if target else "-",
            )
        )
    return out


def show(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
