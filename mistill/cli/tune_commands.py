"""The commands ``mistill tune``: parse, call the Python API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App

from mistill.cli.command_output import is_main_process, print_folder, print_result
from mistill.cli.help_pages import HelpPage
from mistill.cli.options import LISTS, Flat, Texts
from mistill.folders.folder import read_json
from mistill.shown import visible
from tune import PreferenceSettings, ReinforceSettings, RewardSettings, SupervisedSettings

app = App(
    name="tune",
    default_parameter=LISTS,
    help="Tune a model on conversations, preferences or rewards.",
)


@app.command(
    help_formatter=HelpPage(
        {
            "Data": (
                *("texts", "held_out", "other_texts", "other_tokens", "epochs", "tokens"),
                *("block_length", "long_conversations"),
            ),
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
    other_texts: Texts = (),
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
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten. If it is not given, @demo-held-out, which mistill ships.
        settings: How long, through which adapters, and how fast.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed, with the cross-entropy before and after.
    """
    from tune import supervised as tune_model
    from tune.trainers.tuned_folder import REPORT_FILE

    folder = tune_model(
        model,
        target,
        texts=texts,
        held_out=held_out or None,
        other_texts=other_texts or None,
        settings=settings,
        overwrite=overwrite,
    )
    report = read_json(folder / REPORT_FILE)
    if is_main_process():
        print(visible(_summary(report)))
    shown = ("before", "after", "change_standard_error", "other_text", "merges", "merged_into")
    return print_folder(folder, json, **{name: report[name] for name in shown})


def _summary(report: dict[str, Any]) -> str:
    """What tuning did, in two or three lines."""
    before, after = (report[name]["cross_entropy"] for name in ("before", "after"))
    lines = [
        f"held-out cross-entropy: {before:.4f} before, {after:.4f} after ({_change(report)})",
        f"KL(tuned || base) {report['kl']['tuned_from_base']:.4f}, "
        f"KL(base || tuned) {report['kl']['base_from_tuned']:.4f} nats; "
        f"{report['entries_moved']:.1%} of {report['entries']:,} trained weights moved",
    ]
    if len(report["merges"]) > 1:
        ways = ", ".join(f"{value:.4f} into {name}" for name, value in report["merges"].items())
        lines.append(f"merged into the {report['merged_into']} weights: {ways}")
    return "\n".join([*lines, *_forgotten(report)])


def _forgotten(report: dict[str, Any]) -> list[str]:
    """What a report says of text that the model was not tuned on: a line, or none."""
    other = report["other_text"]
    if other is None:
        return []
    before, after = (other[name]["cross_entropy"] for name in ("before", "after"))
    kl = other["kl"]
    return [
        f"on other text ({', '.join(other['texts'])}): cross-entropy {before:.4f} before, "
        f"{after:.4f} after ({_change(other)}); KL(tuned || base) {kl['tuned_from_base']:.4f}, "
        f"KL(base || tuned) {kl['base_from_tuned']:.4f}"
    ]


def _change(figures: dict[str, Any]) -> str:
    """A change of cross-entropy with its paired standard error."""
    error = figures["change_standard_error"]
    spread = "" if error is None else f" +- {error:.4f}"
    return f"{figures['change']:+.4f}{spread} nats a token"


# --- preferences, rewards and reinforcement -------------------------------------------------------

_OPTIMIZATION = (
    *("learning_rate", "warmup", "weight_decay", "max_gradient_norm", "epochs", "steps"),
    *("batch_size", "lora_rank", "lora_alpha", "seed"),
)
_MEMORY = ("base", "micro_batch_size", "gradient_checkpointing", "precision")


@app.command(
    help_formatter=HelpPage(
        {
            "Data": (
                *("pairs", "held_out", "held_out_share", "other_texts", "other_tokens"),
                *("ranking", "max_length"),
            ),
            "Loss": ("loss", "beta", "label_smoothing", "good_weight", "bad_weight"),
            "Optimization": _OPTIMIZATION,
            "Memory and speed": _MEMORY,
            "Evaluation and checkpoints": ("evaluate_every", "keep", "checkpoint_every"),
        }
    )
)
def preferences(
    model: str,
    target: Path,
    /,
    *,
    pairs: Texts,
    held_out: Texts = (),
    other_texts: Texts = (),
    settings: Annotated[PreferenceSettings, Flat] = PreferenceSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Teach a model which of two answers is better: DPO and its kin, KTO, ORPO.

    The same command resumes an interrupted run.

    Args:
        model: The model to tune: a model folder, a Hub id, a GGUF file, or @smollm2.
        target: The model folder to write, with the adapter in adapter/ and what tuning did in
            tuning_report.json.
        pairs: Pairs of a chosen and a rejected answer, or rankings; for the loss kto answers with
            a label too. A .jsonl, .json, .csv or .parquet file, or a Hub dataset.
        held_out: The same to evaluate on. If it is not given, a share of the prompts is held out.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten. If it is not given, @demo-held-out, which mistill ships.
        settings: The loss, the optimization and the evaluation.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    import tune

    folder = tune.preferences(
        model,
        target,
        pairs=pairs,
        held_out=held_out or None,
        other_texts=other_texts or None,
        settings=settings,
        overwrite=overwrite,
    )
    return print_tuned(folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Data": ("pairs", "held_out", "held_out_share", "ranking", "max_length"),
            "Loss": ("margins", "centering"),
            "Optimization": _OPTIMIZATION,
            "Memory and speed": _MEMORY,
            "Evaluation and checkpoints": ("evaluate_every", "keep", "checkpoint_every"),
        }
    )
)
def reward(
    model: str,
    target: Path,
    /,
    *,
    pairs: Texts,
    held_out: Texts = (),
    settings: Annotated[RewardSettings, Flat] = RewardSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Train a reward model on pairs or rankings of answers.

    The same command resumes an interrupted run.

    Args:
        model: The language model to start from: a model folder, a Hub id, a GGUF file, or
            @smollm2.
        target: The folder to write: a model that scores a conversation with one number.
        pairs: Pairs of a chosen and a rejected answer, or rankings. A .jsonl, .json, .csv or
            .parquet file, or a Hub dataset.
        held_out: The same to evaluate on. If it is not given, a share of the prompts is held out.
        settings: The loss, the optimization and the evaluation.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    import tune
    from mistill.folders.json_text import read_json_file

    folder = tune.reward(
        model,
        target,
        pairs=pairs,
        held_out=held_out or None,
        settings=settings,
        overwrite=overwrite,
    )
    report = read_json_file(folder / "tuning_report.json")
    low, high = report["accuracy_interval"]
    words = (
        f"reward model, right about {report['after']['accuracy']:.3f} ({low:.3f} to {high:.3f}) of "
        f"{report['rows']['held_out']} held-out pairs, of which {report['longer_wins']:.3f} have "
        "the longer answer for the better one"
    )
    facts = {"path": str(folder), "before": report["before"], "after": report["after"]}
    return print_result(facts, words, folder, json)


@app.command(
    help_formatter=HelpPage(
        {
            "Data": (
                *("prompts", "held_out", "held_out_share", "held_out_prompts"),
                *("other_texts", "other_tokens", "max_length"),
            ),
            "Judge": ("reward", "check", "schema", "pattern", "function"),
            "Answers": ("samples", "max_new_tokens", "temperature", "top_p"),
            "Method": ("method", "beta", "max_kl"),
            "Optimization": _OPTIMIZATION,
            "Memory and speed": _MEMORY,
            "Evaluation and checkpoints": ("evaluate_every", "keep", "checkpoint_every"),
        }
    )
)
def reinforce(
    model: str,
    target: Path,
    /,
    *,
    prompts: Texts,
    reward: Path | None = None,
    held_out: Texts = (),
    other_texts: Texts = (),
    settings: Annotated[ReinforceSettings, Flat] = ReinforceSettings(),
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Let a model learn from a judge of its own answers: GRPO or RLOO.

    The judge is a reward model, a check that a machine can make, or a function of yours. The same
    command resumes an interrupted run.

    Args:
        model: The model to tune: a model folder, a Hub id, a GGUF file, or @smollm2.
        target: The model folder to write, with the adapter in adapter/ and what tuning did in
            tuning_report.json.
        prompts: Prompts to answer, with the columns that the judge reads. A .txt file with a
            prompt on each line, a .jsonl, .json, .csv or .parquet file, or a Hub dataset.
        reward: The folder of a reward model, as mistill tune reward makes it.
        held_out: Prompts to evaluate on. If it is not given, a share of the prompts is held out.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten. If it is not given, @demo-held-out, which mistill ships.
        settings: The method, another judge, the answers and the optimization.
        overwrite: Replace the target if it exists.
        json: Print the result as one line of JSON at the end.

    Returns:
        The facts that were printed.
    """
    import tune
    from mistill.folders.json_text import read_json_file

    folder = tune.reinforce(
        model,
        target,
        prompts=prompts,
        reward=reward,
        held_out=held_out or None,
        other_texts=other_texts or None,
        settings=settings,
        overwrite=overwrite,
    )
    report = read_json_file(folder / "tuning_report.json")
    before, after = report["before"], report["after"]
    print(
        f"held-out reward {before['reward']:.4f} before and {after['reward']:.4f} after "
        f"{report['kept_step']} of {report['steps']} steps, on {report['rows']['held_out']} "
        f"prompts; answers of {before['tokens']:.0f} tokens before and {after['tokens']:.0f} "
        f"after; KL from the start {report['kl_from_start']:.4f} nats a token"
    )
    for line in _forgotten(report):
        print(visible(line))
    return print_folder(folder, json, before=before, after=after)


def print_tuned(folder: Path, json: bool) -> dict[str, Any]:
    """Print facts about a tuned folder, and what tuning did.

    Args:
        folder: The folder.
        json: Whether to print the facts as one line of JSON too.

    Returns:
        The facts.
    """
    from mistill.folders.json_text import read_json_file

    report = read_json_file(folder / "tuning_report.json")
    before, after = report["before"], report["after"]
    low, high = report["margin_accuracy_interval"]
    print(
        f"held-out loss {before['loss']:.4f} before and {after['loss']:.4f} after "
        f"{report['kept_step']} of {report['steps']} steps; margin accuracy "
        f"{after['margin_accuracy']:.3f} ({low:.3f} to {high:.3f}) on "
        f"{report['rows']['held_out']} rows; KL from the start "
        f"{report['kl']['tuned_from_base']:.4f} nats a token"
    )
    for line in _forgotten(report):
        print(visible(line))
    return print_folder(folder, json, before=before, after=after, kl=report["kl"])
