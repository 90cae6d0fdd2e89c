"""The commands ``mistill tune``: parse, call the Python API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App

from mistill.cli.command_output import is_main_process, print_folder
from mistill.cli.help_pages import HelpPage
from mistill.cli.options import Flat, Texts
from mistill.folders.folder import read_json
from tune import SupervisedSettings

app = App(name="tune", help="Tune a model on conversations, preferences or rewards.")


@app.command(
    help_formatter=HelpPage(
        {
            "Data": ("texts", "held_out", "epochs", "tokens", "block_length", "long_conversations"),
            "Adapters": (
                *("base", "lora_rank", "lora_alpha", "lora_targets", "lora_ranks", "lora_start"),
                *("rslora", "dora"),
            ),
            "Optimization": (
                *("learning_rate", "warmup", "weight_decay", "max_gradient_norm", "optimizer"),
                *("batch_size", "neftune", "seed"),
            ),
            "Memory and speed": (
                *("micro_batch_size", "gradient_checkpointing", "loss_memory_mib", "precision"),
            ),
            "Evaluation and checkpoints": (
                *("evaluate_every", "patience", "held_out_share", "held_out_tokens"),
                *("replies", "reply_tokens", "checkpoint_every", "trackers"),
            ),
        }
    )
)
def supervised(
    model: str,
    target: Path,
    /,
    *,
    texts: Texts,
    held_out: Texts = (),
    settings: Annotated[SupervisedSettings, Flat] = SupervisedSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Tune a model on conversations; only what the assistant writes counts.

    The same command resumes an interrupted run.

    Args:
        model: The model to tune: a model folder, a Hub id, a GGUF file, or @smollm2.
        target: The model folder to write. It holds the merged model, and the adapter in adapter/.
        texts: Conversations to learn from. A .txt, .jsonl, .json, .csv or .parquet file, a Hub
            dataset, or @demo-train.
        held_out: Text on which the model is judged and not tuned. If it is not given, some
            conversations of the texts are held out.
        settings: How long, through which adapters, and how fast.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed, with the cross-entropy before and after.
    """
    from tune import supervised as tune_model
    from tune.supervision.report import REPORT_FILE

    folder = tune_model(
        model,
        target,
        texts=texts,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    report = read_json(folder / REPORT_FILE)
    if is_main_process():
        print(_summary(report))
    shown = ("before", "after", "change_standard_error", "merges", "merged_into")
    return print_folder(folder, json, **{name: report[name] for name in shown})


def _summary(report: dict[str, Any]) -> str:
    """What tuning did, in two or three lines."""
    error = report["change_standard_error"]
    spread = "" if error is None else f" +- {error:.4f}"
    lines = [
        f"held-out cross-entropy: {report['before']:.4f} before, {report['after']:.4f} after "
        f"({report['change']:+.4f}{spread} nats a token)",
        f"KL(tuned || base) {report['tuned_from_base']['kl']:.4f}, "
        f"KL(base || tuned) {report['base_from_tuned']['kl']:.4f} nats; "
        f"{report['entries_moved']:.1%} of {report['entries']:,} trained weights moved",
    ]
    if len(report["merges"]) > 1:
        ways = ", ".join(f"{value:.4f} into {name}" for name, value in report["merges"].items())
        lines.append(f"merged into the {report['merged_into']} weights: {ways}")
    return "\n".join(lines)
