"""Preferences from folder to folder.

Everything that can be wrong with the settings, the folders and the data is found before a weight is
read. Training happens in a hidden folder beside the target, where the reference, the checkpoints
and the numbers are kept, so that the same call resumes what was interrupted. The target appears
when there is a model that got better, and not before.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mistill.errors import TrainingError
from mistill.folders.folder import FolderInfo
from mistill.folders.lineage import add_lineage, fingerprint, name_of_base
from mistill.folders.publishing import publish, refuse_existing, working
from mistill.preferences.reading import divided, read_labelled, read_pairs
from mistill.preferences.tokens import Answer, digest_of, labelled_tokens, pair_tokens
from mistill.settings import result_settings, settings_from
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import precision_of_its_own
from tune.settings import PreferenceSettings
from tune.trainers.library import require_trl
from tune.trainers.opening import open_to_tune
from tune.trainers.other_text import OtherText, check_other_text, read_other_text

if TYPE_CHECKING:
    from tune.options import PreferenceOptions

_log = logging.getLogger(__name__)

# Settings that decide how long a step takes and what is noted on the way, not what is learned.
_SAME_RESULT = ("checkpoint_every", "gradient_checkpointing", "other_tokens")
# Tokens of held-out answers on which the divergence from the start is measured.
_KL_TOKENS = 16_384
# Nats that the log-probability of a better answer may lose without a warning.
_LOST_NATS = 1.0


def preferences(
    model: str | Path,
    target: str | Path,
    *,
    pairs: Texts,
    held_out: Texts | None = None,
    other_texts: Texts | None = None,
    settings: PreferenceSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[PreferenceOptions],
) -> Path:
    """Teach a model which of two answers is better (DPO and its kin, KTO, ORPO), through TRL.

    The model is its own reference: what it holds the answers to be worth before it learns is
    computed once. It is evaluated on held-out pairs before, during and after; the best one found
    is what the target holds, its adapters merged, with the adapter beside it in ``adapter/``. An
    interrupted call resumes from its last checkpoint when it is made again.

    Args:
        model: The model to tune, with float weights and a chat template: a folder, a Hub id, a
            .gguf file, or ``@smollm2``.
        target: The folder to make: the tuned model, ``adapter/``, ``metrics.jsonl`` and
            ``tuning_report.json``.
        pairs: Pairs or rankings of answers; for the loss kto labelled answers too.
        held_out: The same to evaluate on; a share of the prompts of ``pairs`` if not given.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten; the shipped ``@demo-held-out`` if not given.
        settings: The loss and how to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``PreferenceSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range.
        FolderError: If the folder is missing, broken or not of float weights.
        TextError: If the data are missing, or a row is no preference.
        VocabularyError: If there is no chat template.
        TrainingError: If the model got no better, or the loss was not a number.
        MissingExtraError: If TRL or peft is not installed.
    """
    settings = settings_from(PreferenceSettings, settings, options)
    target = refuse_existing(target, overwrite, [model])
    require_trl()
    check_other_text(other_texts, settings)
    info, vocabulary = open_to_tune(model, target, (pairs, held_out), settings)
    learned, judged = _read(pairs, held_out, vocabulary, settings)
    other = read_other_text(other_texts, vocabulary, info.context_length, settings)
    key = {
        "step": "preferences",
        "settings": result_settings(settings, *_SAME_RESULT),
        "model": fingerprint(info.path),
        "pairs": digest_of(learned),
        "held_out": digest_of(judged),
        **vocabulary.date_key,
    }
    base = name_of_base(model, info.path)
    with precision_of_its_own(), working(target, key, anew=overwrite) as work:
        named = {
            "pairs": sources_of(pairs),
            "held_out": [] if held_out is None else sources_of(held_out),
            "other_texts": [] if other_texts is None else sources_of(other_texts),
        }
        _tune(
            work,
            info,
            base,
            vocabulary,
            learned,
            judged,
            other,
            settings,
            fingerprint(info.path),
            named,
        )
        publish(work, target, overwrite)
    return target


def _read(
    pairs: Texts, held_out: Texts | None, vocabulary: Vocabulary, settings: PreferenceSettings
) -> tuple[Any, Any]:
    """What is learned and what is evaluated on, as tokens."""
    longest = settings.max_length

    def read(reader: Any, texts: Texts | None) -> Any:
        if texts is None:
            return None
        return reader(
            texts,
            ranking=settings.ranking,
            seed=settings.seed,
            skip_bad_rows=settings.skip_bad_rows,
        )

    labels = settings.loss == "kto"
    reader, tokens = (read_labelled, labelled_tokens) if labels else (read_pairs, pair_tokens)
    learned, judged = divided(read(reader, pairs), read(reader, held_out), settings.held_out_share)
    make: Any = tokens
    return (
        make(learned, vocabulary, longest, name="the pairs to learn from"),
        make(judged, vocabulary, longest, name="the held-out pairs"),
    )


def _tune(
    work: Path,
    info: FolderInfo,
    base: str,
    vocabulary: Vocabulary,
    learned: Any,
    judged: Any,
    other: OtherText | None,
    settings: PreferenceSettings,
    model_fingerprint: str,
    named: dict[str, list[str]],
) -> None:
    """Train, evaluate, and gather in ``work/result`` what the target will hold."""
    import torch

    from mistill.judging.likelihood import answer_log_probabilities
    from mistill.pytorch.loading import load_pytorch
    from tune.pairwise.figures import figures_of
    from tune.pairwise.log_probabilities import recorded_log_probabilities
    from tune.pairwise.training import answers_of, preference_trainer
    from tune.trainers.running import between_evaluations, emptied, run_trainer, step_total

    steps = step_total(settings, len(learned))
    every = between_evaluations(settings.evaluate_every, steps)
    low = settings.precision == "bfloat16" or (
        settings.precision == "auto" and torch.cuda.is_available()
    )
    model: Any = load_pytorch(info.path, torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")

    def reference(answers: Sequence[Answer], name: str) -> Any:
        digest = hashlib.sha256(repr((model_fingerprint, low, answers)).encode()).hexdigest()
        return recorded_log_probabilities(
            model, answers, work / f"reference-{name}.jsonl", digest, low_precision=low
        )

    held_out = answers_of(judged)
    start = reference(held_out, "held-out")
    trainer = preference_trainer(
        model,
        info.path,
        vocabulary,
        learned,
        reference,
        settings,
        work,
        steps=steps,
        checkpoint_every=settings.checkpoint_every or every,
    )

    def evaluate(step: int) -> dict[str, Any]:
        now = answer_log_probabilities(trainer.model, held_out, low_precision=low)
        return figures_of(judged, now, start, settings).to_dict()

    run = run_trainer(
        trainer,
        work,
        steps=steps,
        what=f"learning preferences ({settings.loss})",
        evaluate=evaluate,
        every=every,
        keep=settings.keep,
    )
    if run.kept_step == 0:
        last = run.judged[max(run.judged)]
        emptied(work)
        raise TrainingError(
            f"the model got no better: its held-out loss was {run.judged[0]['loss']:.4f} before "
            f"and {last['loss']:.4f} after {run.steps} steps; lower learning_rate (now "
            f"{settings.peak_learning_rate:g}), raise beta or give more pairs"
        )
    _finish(
        work, trainer, info, base, run, learned, judged, other, settings, named, model_fingerprint
    )


def _finish(
    work: Path,
    trainer: Any,
    info: FolderInfo,
    base: str,
    run: Any,
    learned: Any,
    judged: Any,
    other: OtherText | None,
    settings: PreferenceSettings,
    named: dict[str, list[str]],
    model_fingerprint: str,
) -> None:
    from mistill.pytorch.loading import load_pytorch
    from mistill.training.metrics import METRICS_FILE
    from tune.pairwise.figures import interval_of, length_figures
    from tune.pairwise.training import answers_of
    from tune.trainers.moved import divergence_from_start, forgetting
    from tune.trainers.tuned_folder import ADAPTER_FOLDER, write_adapter, write_merged, write_report

    before, after = run.judged[0], run.judged[run.kept_step]
    report = {
        "loss": settings.loss,
        "rows": {"learned": len(learned), "held_out": len(judged)},
        "before": before,
        "after": after,
        "margin_accuracy_interval": interval_of(after["margin_accuracy"], len(judged)),
        "tokens_of_answers": {
            "learned": length_figures(learned),
            "held_out": length_figures(judged),
        },
        "kl": divergence_from_start(
            trainer.model, lambda: load_pytorch(info.path), answers_of(judged), _KL_TOKENS
        ),
        "other_text": forgetting(trainer.model, lambda: load_pytorch(info.path), other),
        "reference": {"model": model_fingerprint, "pairs": digest_of(learned)},
        "steps": run.steps,
        "kept_step": run.kept_step,
        "steps_done_again": run.again,
        "evaluations": {str(step): figures for step, figures in run.judged.items()},
    }
    warn_of_displacement(before, after)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    if settings.lora_rank:
        write_adapter(trainer.model, result / ADAPTER_FOLDER, base)
    write_merged(trainer.model, info.path, result)
    shutil.copyfile(work / METRICS_FILE, result / METRICS_FILE)
    write_report(result, report)
    add_lineage(
        result,
        step="preferences",
        settings=settings,
        source=info.path,
        **named,
        before=before,
        after=after,
        kl=report["kl"],
        other_text=report["other_text"],
        steps=run.steps,
        kept_step=run.kept_step,
        steps_done_again=run.again,
    )


def warn_of_displacement(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Say so where the better answers became less likely, which a growing margin hides.

    Args:
        before: Figures of the start.
        after: Figures of the tuned model.
    """
    lost = before["chosen"] - after["chosen"]
    if lost > _LOST_NATS:
        _log.warning(
            "the better answers became less likely: log p fell by %.1f nats an answer, and that of "
            "the others by %.1f; what the model says instead is neither of the two: raise beta, "
            "lower learning_rate, or tune on the better answers first",
            lost,
            before["rejected"] - after["rejected"],
        )
