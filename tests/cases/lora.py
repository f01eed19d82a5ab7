"""Cases of jobs with adapters: what is exported, saved and mirrored."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import elastic_lsopt as lso
from elastic_lsopt.checkpoint import Checkpointer
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from elastic_lsopt.checkpoint.huggingface.export_adapter import export_adapter
from elastic_lsopt.elastic.memory.versions import HostVersions
from tests.cases import engines

TOKENS = torch.arange(24).view(2, 12) % 61
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("causal_lm", {"model_type": "llama", "intermediate_size": 40, "num_key_value_heads": 3, **SIZES},
              {"target_modules": ("q_proj", "mlp.up_proj"), "dropout": 0.1}),
    "tied": ("causal_lm", {"model_type": "llama", "intermediate_size": 40, "tie_word_embeddings": True, **SIZES},
             {"target_modules": "all-linear", "use_rslora": True, "base_dtype": "bf16"}),
    "gpt2": ("causal_lm", {"model_type": "gpt2", **SIZES}, {"target_modules": ("c_attn", "c_proj")}),
    "bert": ("sequence_classification", {"model_type": "bert", "intermediate_size": 40, **SIZES},
             {"target_modules": ("query", "value")}),
}  # fmt: skip


def plain_model(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    task, shape, _ = MODELS[name]
    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    torch.manual_seed(0)
    return kind.from_config(AutoConfig.for_model(**shape))


def wrapped(model: nn.Module, adversary: bool = False) -> nn.Module:
    """A PeftModel, as a user's own code makes one."""
    import peft

    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    made: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **settings))  # type: ignore[arg-type]
    if adversary:
        made.add_adapter("adversary", peft.LoraConfig(r=5, lora_alpha=5, **settings))  # type: ignore[arg-type]
        made.base_model.set_adapter(["default", "adversary"])
    return made


def exported(path: str, kind: str, name: str, own: bool = False, adversary: bool = False) -> dict[str, Any]:
    """Train adapters for two steps, write them and the merged model; the largest differences of logits when others
    load the two. `own`: the model is a PeftModel of the user's; `adversary`: by Bi-LoRA, whose second one is left."""
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    task, _, lora = MODELS[name]
    base = plain_model(name)
    model = copy.deepcopy(base)
    if own:
        model = wrapped(model, adversary)
    else:
        engines.adapt(model, task=task, adversary=5 if adversary else None, **lora)
    classes = task != "causal_lm"
    batch = {"input_ids": TOKENS, "labels": torch.tensor([0, 1]) if classes else TOKENS}
    method = lso.BiLoRA(r=5, rho=5.0) if adversary else lso.SAM(rho=0.1)
    engine = engines.build(kind, model, method, base="adam", loss_fn=None)
    for _ in range(2):
        engine.train_batch([batch])
    engine.module.eval()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return engine.backend.forward(input_ids=TOKENS).logits.float()

    trained = logits()
    with engine.averaged("bi_lora") if adversary else nullcontext():
        wanted = logits()
    folder = Path(path)
    export_adapter(engine.backend, engine.module, folder / "adapter")
    export_huggingface(engine.backend, engine.module, folder / "merged", shard_bytes=8000)
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    if lora.get("base_dtype") == "bf16" and not own:
        for p in base.parameters():  # and no buffer: rotary tables stay fp32
            p.data = p.data.bfloat16()
    by_peft = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()  # type: ignore[arg-type]
    merged = auto.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        apart = {
            "adapter": float((by_peft(input_ids=TOKENS).logits.float() - wanted).abs().max()),
            "merged": float((merged(input_ids=TOKENS).logits.float() - wanted).abs().max()),
        }
    engines.close(engine)
    written = [n for file in (folder / "merged").glob("*.safetensors") for n in load_file(file)]
    return {
        **apart, "trained": float((trained - wanted).abs().max()), "kind": type(merged).__name__,
        "strange": [n for n in written if "lora" in n or "base" in n],
        "files": sorted(p.name for p in (folder / "adapter").iterdir()),
        "in the adapter": sorted(load_file(folder / "adapter" / "adapter_model.safetensors")),
    }  # fmt: skip


def noisy(kind: str, sigma: float = 0.5, recompute: bool = False, bf16: bool = False) -> dict[str, Any]:
    """Steps of Flat-LoRA and of none on a Llama: whether the frozen weights are the same bits, how far the two are
    apart, and the bytes that are saved for backward passes (the weights that are there anyway among them)."""
    from elastic_lsopt.training.building.models import apply_activation_checkpointing

    runs, saved = {}, {}
    for name, method in (("flat", lso.FlatLoRA(sigma=sigma)), ("none", lso.Plain())):
        model = plain_model("llama")
        engines.adapt(model, task="causal_lm", base_dtype="bf16" if bf16 else "fp32")
        if recompute:
            apply_activation_checkpointing(model)
        engine = engines.build(kind, model, method, loss_fn=None, total_samples=12)
        backend, most = engine.backend, 0
        frozen = [p for p in backend.module.parameters() if not p.requires_grad]  # type: ignore[union-attr]
        before = [backend.full_parameter(p).clone() for p in frozen]

        def count(t: Any) -> Any:
            nonlocal most
            most += t.untyped_storage().nbytes()
            return t

        for _ in range(3):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
                engine.train_batch([{"input_ids": TOKENS, "labels": TOKENS}])
        backend.drop_gathered()
        same = all(torch.equal(backend.full_parameter(p), was) for p, was in zip(frozen, before, strict=True))
        runs[name], saved[name] = (same, engines.whole(engine.space)), most
        engines.close(engine)
    (same, flat), (_, none) = runs.values()
    return {"same": same, "apart": max(float((flat[n] - none[n]).abs().max()) for n in flat), "saved": saved}


def kept_bytes(path: str, kind: str) -> dict[str, int]:
    """Bytes of a checkpoint's tensors, of a version in host memory, and of the adapters and of the whole model."""
    model = plain_model("llama")
    whole = sum(p.nbytes for p in model.parameters())
    engines.adapt(model, task="causal_lm", target_modules=("q_proj", "v_proj"))
    engine = engines.build(kind, model, lso.Plain(), base="momentum", loss_fn=None)
    engine.train_batch([{"input_ids": TOKENS, "labels": TOKENS}])
    checkpoints = Checkpointer(path)
    checkpoints.save(engine, 1)
    report = checkpoints.wait()
    assert report is not None and report.error is None
    checkpoints.close()
    version = HostVersions().take(engine, generation=1, step=1, extra={})
    adapters = 4 * engine.space.layout.numel
    saved = sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
    out = {"adapters": adapters, "whole": whole, "saved": saved, "mirrored": version.buffer.nbytes}
    engines.close(engine)
    return out


def refused_without_adapters() -> str:
    try:
        engines.build("plain", engines.net(), lso.FlatLoRA(), total_samples=12)
    except lso.UserError as error:
        return str(error)
    return "nothing"
