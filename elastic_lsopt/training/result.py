"""The end of a job: the exported model, the picture, and the lines that say what was reached and what to do next."""

from __future__ import annotations

from pathlib import Path

from elastic_lsopt.checkpoint.export import export_huggingface
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.faces.engine import Engine
from elastic_lsopt.report.loss_curve import draw_loss
from elastic_lsopt.training.console import Console
from elastic_lsopt.training.data import Data
from elastic_lsopt.training.run_folder import read_metrics
from elastic_lsopt.training.world import World


def finish(config: TrainConfig, engine: Engine, data: Data, world: World, console: Console) -> None:
    """Export the model (collective), draw loss.png, say how it went (rank 0). A full disk is told, not raised."""
    run = Path(config.output_dir)
    model = run / "model"
    if config.export:
        try:
            export_huggingface(engine.backend, engine.module, model)
        except OSError as error:
            console.say(f"the model could not be exported to {model}: {error.strerror}")
    if not world.is_first:
        return
    rows = read_metrics(run / "metrics.jsonl")
    scale = data.bytes_per_token or 1.0
    reference = None if data.bigram_entropy is None else ("byte-bigram entropy", data.bigram_entropy * scale)
    try:
        draw_loss(rows, run / "loss.png", title=f"{config.dataset}: {engine.method!r}", reference=reference)
    except OSError as error:
        console.say(f"loss.png could not be drawn: {error.strerror}")
    _say_result(rows, data, scale, console)
    console.say(f"pictures, metrics and checkpoints: {run}/")
    if config.export:
        console.say(_how_to_use(config, model))


def _say_result(rows: list[dict[str, float]], data: Data, scale: float, console: Console) -> None:
    held_out = [r["eval_loss"] for r in rows if "eval_loss" in r]
    if not held_out:
        return
    reached = held_out[-1] / scale
    if data.bigram_entropy is None:
        console.say(f"held-out loss: {reached:.4f} nats")
        return
    verdict = "below" if reached < data.bigram_entropy else "NOT below"
    console.say(
        f"held-out loss: {reached:.4f} nats a byte, {verdict} the corpus's byte-bigram entropy of {data.bigram_entropy:.4f}"
    )


def _how_to_use(config: TrainConfig, folder: Path) -> str:
    if config.task == "classification":
        return f"use it: model.load_state_dict(safetensors.torch.load_file('{folder}/model.safetensors'))"
    kind = "AutoModelForCausalLM" if config.task == "causal_lm" else "AutoModelForSequenceClassification"
    return f"use it: transformers.{kind}.from_pretrained('{folder}')"
