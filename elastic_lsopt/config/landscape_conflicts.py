"""What the `landscape` block, the method of a job, does not go with."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_lsopt.config.settings import EVALUATE_ELSEWHERE, TrainConfig, in_halves, landscape_fields, lr_rule

NOT_THE_BATCH_ALONE = {
    "bi_lora": "that of its adversary", "entropy_sgd": "the noise of its walk", "esam": "its choice of tensors",
    "flat_lora": "the noise of the weights", "looksam": "the direction that it keeps",
    "lpf_sgd": "the noise of its draws", "random_sam": "the noise of its direction", "rwp": "the noise of its draw",
}  # fmt: skip
"""Methods by whose gradients no noise of the batch can be told, and what else is in them."""


def landscape_conflicts(c: TrainConfig, optims: set[str]) -> Iterator[tuple[str, str]]:
    """(key, message) of each; `optims` are the updates of all param groups."""
    if ("method" in c.landscape) == ("import" in c.landscape) or not isinstance(landscape_fields(c)[0], str):
        yield (
            "landscape",
            "landscape needs `method`, a name such as none, sam, asam or lpf_sgd, or `import`: 'package.module:Class'.",
        )
        return
    yield from _merged_conflicts(c, landscape_fields(c)[0])
    yield from _halves_conflicts(c)
    yield from _noise_conflicts(c, landscape_fields(c)[0])
    if landscape_fields(c)[0] == "bi_lora":
        yield from _adversary_conflicts(c, optims)


def _noise_conflicts(c: TrainConfig, method: str) -> Iterator[tuple[str, str]]:
    """The noise of the batch is measured by the steps' gradients, in which there may be nothing else."""
    if method not in NOT_THE_BATCH_ALONE:
        return
    among = f"measures the noise of the batch by the gradient, and with {method} {NOT_THE_BATCH_ALONE[method]} is in it"
    if c.batch_schedule is not None and c.batch_schedule.kind == "noise_scale":
        yield "batch_schedule", f"batch_schedule.kind=noise_scale {among}; use ramp."
    for key, block in (("batch_schedule", c.batch_schedule), ("elastic", c.elastic)):
        if block is not None and lr_rule(c, block) == "adascale":
            yield f"{key}.lr_rule", f"lr_rule=adascale {among}; use linear."


def _halves_conflicts(c: TrainConfig) -> Iterator[tuple[str, str]]:
    key = "landscape.halves"
    if not in_halves(c):
        return
    if c.elastic is not None:
        yield (
            key,
            f"{key}: an elastic job may come to an odd number of ranks; remove the elastic block, or set it false.",
        )
    if c.backend != "replicated":
        yield (
            key,
            f"{key} needs every rank to hold all weights as they are, but backend={c.backend} keeps them its own way; "
            "use backend: replicated, or set it false.",
        )
    if c.workers > 1 and c.workers % 2:
        yield key, f"{key}: workers={c.workers} cannot be parted into two halves; use an even number, or set it false."


def _merged_conflicts(c: TrainConfig, method: str) -> Iterator[tuple[str, str]]:
    if method == "flat_lora" and c.lora is None:
        yield "landscape", "landscape: flat_lora moves the weights that adapters are merged into; add a lora block."
    if method == "nbar" and c.lora is None:
        yield "landscape", "landscape: nbar balances the two factors of LoRA; add a lora block."
    if method == "bi_lora" and c.lora is None:
        yield "landscape", "landscape: bi_lora trains a second adapter against that of LoRA; add a lora block."
    if method == "flat_lora" and c.landscape_space != "merged":
        yield "landscape", "landscape: flat_lora moves the merged weights; set landscape_space: merged."
    if method != "flat_lora" and c.landscape_space == "merged":
        why = {
            "sam": "its way up is the gradient of the merged weights, which LoRA never computes",
            "asam": "its way up is the gradient of the merged weights, which LoRA never computes",
            "none": "it moves nothing",
        }.get(method, "of other methods it is not tested")
        yield (
            "landscape_space",
            f"landscape_space=merged is for method flat_lora, but method={method}: {why}; remove the key.",
        )


def _adversary_conflicts(c: TrainConfig, optims: set[str]) -> Iterator[tuple[str, str]]:
    """What bi_lora's second adapter, which is trained upwards, does not go with."""
    if elsewhere := sorted(optims & EVALUATE_ELSEWHERE):
        yield (
            "optim",
            f"optim={elsewhere[0]} keeps the weights in other places too, and bi_lora moves them when it has stepped; "
            "use adamw.",
        )
    if c.lr_scheduler_type == "autodrop":
        yield (
            "lr_scheduler_type",
            "lr_scheduler_type=autodrop looks how the weights turn, and with bi_lora its adversary turns among them; "
            "use cosine.",
        )
