"""The end of a job: the exported model, the picture, and the lines that say what was reached and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_lsopt.api.engine import Engine
from elastic_lsopt.checkpoint.checkpointer import SaveReport
from elastic_lsopt.checkpoint.divergence import Streak
from elastic_lsopt.checkpoint.folder import listing
from elastic_lsopt.checkpoint.huggingface.export import export_huggingface
from elastic_lsopt.checkpoint.huggingface.export_adapter import export_adapter
from elastic_lsopt.checkpoint.huggingface.export_folder import EXPORTED, refusal
from elastic_lsopt.config.settings import TrainConfig
from elastic_lsopt.elastic.worker.journal import read_journal
from elastic_lsopt.errors import UserError
from elastic_lsopt.report.pictures.draw_loss_curve import draw_loss
from elastic_lsopt.report.pictures.draw_members import draw_members
from elastic_lsopt.report.run import held_out_metrics
from elastic_lsopt.training.building.base_optimizer import name_of_base
from elastic_lsopt.training.datasets.samples import Data
from elastic_lsopt.training.datasets.tokens import FolderTokens
from elastic_lsopt.training.reporting.console import Console
from elastic_lsopt.training.reporting.model_card import model_card
from elastic_lsopt.training.reporting.run_folder import METRICS, read_metrics


def export_folders(config: TrainConfig) -> dict[str, Path]:
    """What a job exports at its end, the `model`, its `adapter` or both, and where to."""
    wanted = "merged" if config.lora is None else config.lora.export
    names = {"merged": ["model"], "adapter": ["adapter"], "both": ["adapter", "model"]}[wanted]
    return {name: Path(config.output_dir) / name for name in (names if config.export else [])}


def refuse_foreign(config: TrainConfig) -> None:
    """Raise UserError, before the first step, where files of others would be in an export's way after the last."""
    for folder in export_folders(config).values():
        if reason := refusal(folder):
            raise UserError(f"the export to {folder} would fail at the end: {reason}; or set export: false.")


def finish(config: TrainConfig, engine: Engine, data: Data, console: Console, *, is_first: bool) -> str | None:
    """Export the model (collective), draw the pictures, say how it went (rank 0); why the export failed, if it has."""
    run = Path(config.output_dir)
    failure = how_to_use = None
    try:
        how_to_use = _export(config, engine, data, run, console)
    except UserError as error:
        failure = str(error)
    if is_first:
        rows = read_metrics(run / METRICS)
        try:
            _draw(config, engine, data, rows, run / "loss.png")
            if config.elastic is not None:
                title = f"{Path(config.output_dir).name}: members, batch, rate and loss"
                draw_members(rows, read_journal(run), run / "members.png", title=title)
        except OSError as error:
            console.say(f"the pictures could not be drawn: {error.strerror}")
        _say_result(rows, data, console)
        console.say(f"pictures, metrics and checkpoints: {run}/")
        if how_to_use is not None:
            console.say(how_to_use)
    return failure


def say_stopped(step: str, folder: Path, console: Console, streak: Streak, *, here: bool) -> None:
    """Where a run that a signal has ended goes on from: `here`, or the newest checkpoint of `folder`, and why."""
    why = f": {streak.reason}" if streak.length else ""
    there = "there" if here else f"{next(iter(listing(folder)), 'the beginning')}{why}"
    console.say(f"stopped after step {step}; the same command goes on from {there}.")


def say_what_is_missing(
    saved: SaveReport | None, export_failure: str | None, folder: Path, console: Console, *, is_result: bool
) -> None:
    """The last line of a run whose end is in no checkpoint (`saved` says how the last save ended), or not exported.

    Raises UserError where the job does not leave what it was told to: its export, or, with `is_result`, its end in a
    checkpoint.
    """
    unsaved = None if saved is None else saved.error
    lines = [] if export_failure is None else [export_failure.rstrip(".")]
    if unsaved is not None:
        lines.append(f"the end of this run is in no checkpoint, its save failed ({unsaved})")
    if not lines:
        return
    good = next(iter(listing(folder)), None)
    lines.append(f"the last good checkpoint is {good}" if good else "there is no good checkpoint")
    lines.append(f"the same command goes on from {'it' if good else 'the beginning'}")
    line = "; ".join(lines) + "."
    if export_failure is not None or (unsaved is not None and is_result):
        raise UserError(line)
    console.say(line)


def _export(config: TrainConfig, engine: Engine, data: Data, run: Path, console: Console) -> str | None:
    """Write the model, its adapter or both, if the job exports; the line that says how to use it."""
    tokenizer = data.tokens.tokenizer if isinstance(data.tokens, FolderTokens) else None
    folders = export_folders(config)
    if not folders:
        return None
    at = config.evaluate_average or engine.evaluates_at
    mean = None if at is None else engine.average(at)
    if "adapter" in folders:
        export_adapter(engine.backend, engine.module, folders["adapter"], tokenizer, weights=mean)
    if "model" in folders:
        card = model_card(
            config, method=engine.method, base=name_of_base(engine.base), clock=engine.clock,
            parameters=engine.space.layout.numel, held_out_loss=_last_held_out(run), journal=read_journal(run),
        )  # fmt: skip
        export_huggingface(engine.backend, engine.module, folders["model"], tokenizer, weights=mean, card=card)
    for other in {run / "model", run / "adapter"}.difference(folders.values()):
        if config.lora is not None and (other / EXPORTED).exists():
            console.say(f"{other} has the weights of an earlier export; remove it, or set lora.export: both.")
    if "model" not in folders:
        return f"use it: peft.PeftModel.from_pretrained(base, '{folders['adapter']}')"
    if not (folders["model"] / "config.json").exists():
        return f"use it: model.load_state_dict(safetensors.torch.load_file('{folders['model']}/model.safetensors'))"
    kind = "AutoModelForCausalLM" if config.task == "causal_lm" else "AutoModelForSequenceClassification"
    ids = "; its token ids are the bytes of the text" if tokenizer is None else ""
    return f"use it: transformers.{kind}.from_pretrained('{folders['model']}'){ids}"


def _last_held_out(run: Path) -> float | None:
    told = [row["eval_loss"] for row in read_metrics(run / METRICS) if row.get("eval_loss") is not None]
    return told[-1] if told else None


def _draw(config: TrainConfig, engine: Engine, data: Data, rows: list[dict[str, Any]], target: Path) -> None:
    unit, reference = "nats", None
    if data.bigram_entropy is not None and data.bytes_per_token is not None:
        unit, reference = "nats a token", ("byte-bigram entropy", data.bigram_entropy * data.bytes_per_token)
    title = f"{type(engine.method).__name__} over {name_of_base(engine.base)}, {Path(config.dataset).name}"
    draw_loss(rows, target, title=title, unit=unit, reference=reference)


def _say_result(rows: list[dict[str, Any]], data: Data, console: Console) -> None:
    skipped = sum(bool(r.get("skipped")) for r in rows)
    if skipped:
        console.say(f"{skipped} of {len(rows)} steps were skipped: their loss or gradient was not finite")
    held_out = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    if not held_out:
        return
    step, loss = held_out[-1]
    at = "" if step == rows[-1]["step"] else f" after step {step}"
    if data.bigram_entropy is None or data.bytes_per_token is None:
        last = next(r for r in reversed(rows) if r["step"] == step)
        metrics = "".join(f", {name} {value:.4f}" for name, value in held_out_metrics(last))
        console.say(f"held-out loss{at}: {loss:.4f} nats{metrics}")
        return
    reached = loss / data.bytes_per_token
    verdict = "below" if reached < data.bigram_entropy else "NOT below"
    console.say(
        f"held-out loss{at}: {reached:.4f} nats a byte, "
        f"{verdict} the corpus's byte-bigram entropy of {data.bigram_entropy:.4f}"
    )
