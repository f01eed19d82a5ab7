"""The `lora:` block: train a product of two thin matrices beside each chosen layer, and leave the model itself alone.

    LoraConfig(r=16, alpha=32, target_modules=("q_proj", "v_proj"), base_dtype="bf16")

A layer W becomes W + s B A, s = alpha / r. Names are peft's, without its prefix `lora_`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from elastic_lsopt.config.ranges import BLOCK, BelowOne, Count, Flag, Name, Positive, SettingError

Names = Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]


@dataclass(frozen=True, kw_only=True, config=BLOCK)
class LoraConfig:
    """Adapters through peft; the trained parameters are theirs alone. Raises as `TrainConfig` does."""

    r: Count = 8
    """Rank of the product B A."""
    alpha: Positive = 16
    """The product is multiplied by alpha / r (with use_rslora by alpha / sqrt r)."""
    dropout: BelowOne = 0.0
    """Share of the adapters' inputs that is dropped in training, in [0, 1)."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Names of layers, or ends of them, such as q_proj or mlp.up_proj; all-linear: every linear layer but the head."""
    use_rslora: Flag = False
    """Multiply by alpha / sqrt r, which keeps its size as r grows."""
    modules_to_save: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Layers that are trained whole, in a copy of their own; the new head of sequence_classification always is."""
    base_dtype: Literal["fp32", "bf16", "nf4"] = "fp32"
    """What the frozen model is kept in; the adapters are fp32. (With DeepSpeed the whole model is in the engine's
    precision: bf16 goes with bf16: true.)"""
    export: Literal["adapter", "merged", "both"] = "adapter"
    """adapter: a folder for peft's from_pretrained; merged: the whole model, W + s B A in place of W; or both."""

    def __post_init__(self) -> None:
        if self.base_dtype == "nf4":
            raise SettingError(
                "lora.base_dtype",
                "lora.base_dtype=nf4 is refused: bitsandbytes' 4-bit weights need a GPU, and no test here has trained "
                "on them; use bf16.",
            )
