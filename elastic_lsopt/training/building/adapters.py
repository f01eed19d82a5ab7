"""LoRA: peft's layers around the chosen layers of a model, everything else frozen.

The model keeps its class and stays the root (peft injects its layers, no wrapper around them), so that blocks, losses
and export find what they know. The adapters' first values are drawn from the job's seed on the CPU, as all first
weights are: a rank that joins later, on any backend, builds the same model from the folder or the seed, and is sent the
adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from elastic_lsopt.backends.adapters.adversary import ADVERSARY
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.settings import SettingError
from elastic_lsopt.config.spelling import did_you_mean
from elastic_lsopt.oracle.replay.slot import replayed

LINEAR = ("Linear", "Conv1D")
HEADS = ("score", "classifier")
"""What transformers' sequence classifiers call a head that no pretrained folder brings."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "classification": None}


def add_adapters(
    model: nn.Module, lora: LoraConfig, *, task: str, seed: int, base: str | None = None, adversary: int | None = None
) -> None:
    """Put the adapters into the model, in place, and freeze the rest; `base` is the folder or name that it came from.

    `adversary` is the rank of a second one in the same layers, for bi_lora: of the same factor s, without dropout.

    Raises SettingError, one line, for names that match no layer (the nearest is named), a layer that is not linear, a
    weight that is another layer's too, and where peft is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise SettingError(
            "lora", "lora needs peft, which is not installed: pip install 'elastic_lsopt[peft]'."
        ) from None

    targets = lora.target_modules
    if not isinstance(targets, str):
        _refuse_unmatched(model, "target_modules", targets)
    _refuse_unmatched(model, "modules_to_save", lora.modules_to_save)
    heads = HEADS if task == "sequence_classification" else ()
    whole = [*lora.modules_to_save, *(h for h in heads if hasattr(model, h) and h not in lora.modules_to_save)]
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets), modules_to_save=whole or None,
        task_type=TASKS[task], base_model_name_or_path=base,
    )  # fmt: skip
    place = next(model.parameters()).device
    try:
        with replayed(seed, torch.device("cpu")), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice for folders that we do not write
            peft.inject_adapter_in_model(settings, model, low_cpu_mem_usage=place.type == "meta")
            if adversary is not None:  # after the other, whose first values are the same with it
                _add_adversary(model, lora, adversary, low_cpu_mem_usage=place.type == "meta")
    except (ValueError, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingError(
            "lora.target_modules", f"lora.target_modules={targets!r} cannot be adapted: {reason}"
        ) from None
    _refuse_others(model)
    _refuse_tied(model)
    _cast(model, DTYPES[lora.base_dtype])


def _add_adversary(model: nn.Module, lora: LoraConfig, r: int, *, low_cpu_mem_usage: bool) -> None:
    import peft

    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    settings = peft.LoraConfig(
        r=r, lora_alpha=r * lora.alpha / (lora.r**0.5 if lora.use_rslora else lora.r),  # type: ignore[arg-type]
        target_modules="|".join(map(re.escape, adapted)),
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, model, ADVERSARY, low_cpu_mem_usage=low_cpu_mem_usage)
    for layer in adapted.values():
        layer.set_adapter([*layer.lora_A])  # type: ignore[operator,misc]


def _cast(model: nn.Module, base: torch.dtype) -> None:
    """Frozen parameters in that type, trained ones in fp32; a parameter that two modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                dtype = torch.float32 if p.requires_grad else base
                made.setdefault(id(p), p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype), p.requires_grad))
                module._parameters[name] = made[id(p)]


def _refuse_unmatched(model: nn.Module, key: str, wanted: Sequence[str]) -> None:
    """As peft matches: a name is a module's own, or the end of it after a dot."""
    names = [name for name, _ in model.named_modules() if name]
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            near = did_you_mean(one, sorted(_ends(names, one.count("."))))
            raise SettingError(f"lora.{key}", f"lora.{key}: no layer is called {one!r}{near}")


def _ends(names: Iterable[str], dots: int) -> set[str]:
    """The last parts of the modules' names, as many as the wanted name has."""
    return {".".join(name.split(".")[-1 - dots :]) for name in names if not name.rpartition(".")[2].isdigit()}


def _refuse_others(model: nn.Module) -> None:
    """peft adapts embeddings and convolutions too, in ways that no test here covers."""
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is not None and type(base).__name__ not in LINEAR:
            raise SettingError(
                "lora.target_modules",
                f"lora.target_modules: {name} is a {type(base).__name__}, supported are linear layers "
                f"({' and '.join(LINEAR)}); leave it out.",
            )


def _refuse_tied(model: nn.Module) -> None:
    """A weight under two names would get a product at one of them, and could not be merged."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for several in names.values():
        if len(several) > 1 and (adapted := [n for n in several if ".base_layer." in n or ".modules_to_save." in n]):
            other = next((n for n in several if n not in adapted), several[0])
            layer = adapted[0].partition(".base_layer.")[0].partition(".modules_to_save.")[0]
            raise SettingError(
                "lora.target_modules",
                f"lora.target_modules: the weight of {layer} is that of {other.rpartition('.')[0]} too (tied), so it "
                "cannot be adapted alone; leave it out.",
            )
