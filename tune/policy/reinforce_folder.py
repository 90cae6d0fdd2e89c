"""Reinforcement from folder to folder.

The model answers prompts, a judge says how good each answer is, and what was better than the other
answers to the same prompt becomes likelier. How far the model has moved from its start is measured
at every step, and the run stops where that exceeds a bound: a judge is right about answers like
those that it knows, and a model that moves far finds the ones that it is wrong about.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mistill.errors import TextError, TrainingError
from mistill.folders.folder import FolderInfo
from mistill.folders.lineage import add_lineage, fingerprint, name_of_base
from mistill.folders.publishing import publish, refuse_existing
from mistill.judging.judge import Judge, RewardFunction, judge_of
from mistill.preferences.reading import PromptRow, divided, read_prompt_rows
from mistill.settings import require, result_settings, settings_from
from mistill.text.answers import prompt_ids, refuse_unwritten
from mistill.text.rows import Texts, sources_of
from mistill.text.vocabulary import Vocabulary
from mistill.training.processes import precision_of_its_own, this_process
from mistill.training.together import working_together
from tune.settings import ReinforceSettings
from tune.trainers.library import require_trl
from tune.trainers.opening import open_to_tune
from tune.trainers.other_text import OtherText, check_other_text, read_other_text

if TYPE_CHECKING:
    from tune.options import ReinforceOptions
    from tune.trainers.ending import End
    from tune.trainers.running import Run

_log = logging.getLogger(__name__)

_SAME_RESULT = ("checkpoint_every", "gradient_checkpointing", "other_tokens")
# Shares above which the run is warned of.
_MANY_ALIKE, _MANY_CUT = 0.5, 0.3


def reinforce(
    model: str | Path,
    target: str | Path,
    *,
    prompts: Texts,
    reward: str | Path | RewardFunction | None = None,
    held_out: Texts | None = None,
    other_texts: Texts | None = None,
    settings: ReinforceSettings | None = None,
    overwrite: bool = False,
    **options: Unpack[ReinforceOptions],
) -> Path:
    """Let a model learn from a judge of its own answers (GRPO or RLOO), through TRL.

    The judge is a reward model, a function, or a check that a machine can make. An interrupted
    call resumes from its last checkpoint when it is made again.

    With ``base="nf4"`` the frozen weights are held in 4 bits while training (QLoRA), and of the
    two ways to merge the one with the higher held-out reward is taken. Under ``accelerate launch``
    or torchrun every process makes the same call; each draws and judges its part of the answers of
    a step, and one of them writes. Several processes draw other answers than one does.

    Args:
        model: The model to tune, with a chat template: a float folder, or one in NF4 for
            ``base="nf4"``; a Hub id, a .gguf file, or ``@smollm2``.
        target: The folder to make: the tuned model, ``adapter/``, ``metrics.jsonl`` and
            ``tuning_report.json``.
        prompts: Prompts to answer, with the columns that the judge reads.
        reward: The folder of a reward model, or a function that is called with the turns of a
            prompt, an answer and the other columns of the row, and gives a number.
        held_out: Prompts to evaluate on; a share of ``prompts`` if not given.
        other_texts: Text that the model is not tuned on, by which the report says what it has
            forgotten; the shipped ``@demo-held-out`` if not given.
        settings: The method, another judge, and how to train; or give its fields as keywords.
        overwrite: Whether an existing target is replaced.
        **options: Fields of ``ReinforceSettings``.

    Returns:
        The target.

    Raises:
        SettingsError: If a setting is out of range, or not exactly one judge is given.
        FolderError: If a folder is missing, broken or not of its kind.
        ArchitectureError: If the model is neither Llama nor Mistral, or its rows do not fit NF4.
        TextError: If there are no prompts, or one lacks what the judge reads.
        VocabularyError: If there is no chat template.
        TrainingError: If the judge fails, or the model got no better.
        MissingExtraError: If TRL or peft is not installed.
    """
    settings = settings_from(ReinforceSettings, settings, options)
    folder_of_judge = reward if isinstance(reward, str | Path) else None
    sources = [model] if folder_of_judge is None else [model, folder_of_judge]
    target = refuse_existing(target, overwrite, sources)
    require_trl(settings)
    opened = judge_of(
        reward=reward,
        check=settings.check,
        schema=settings.schema,
        pattern=settings.pattern,
        function=settings.function,
    )
    check_other_text(other_texts, settings)
    info, vocabulary = open_to_tune(model, target, (prompts, held_out), settings)
    require(bool(vocabulary.end_ids), f"{model} has no token that ends a reply")
    judge = opened()
    learned, judged = _read(prompts, held_out, judge, vocabulary, settings)
    other = read_other_text(other_texts, vocabulary, info.context_length, settings)
    key = {
        "step": "reinforce",
        "settings": result_settings(settings, *_SAME_RESULT),
        "model": fingerprint(info.path),
        "judge": judge.name if folder_of_judge is None else fingerprint(folder_of_judge),
        "prompts": _digest(learned),
        "held_out": _digest(judged),
        "processes": this_process().num_processes,
        **vocabulary.date_key,
    }
    base = name_of_base(model, info.path)
    with (
        precision_of_its_own(),
        working_together(target, key, this_process(), overwrite) as work,
    ):
        facts = _train(work, info, base, vocabulary, learned, judged, other, judge, settings)
        if this_process().is_main_process:
            add_lineage(
                work / "result",
                step="reinforce",
                settings=settings,
                source=info.path,
                prompts=sources_of(prompts),
                held_out=[] if held_out is None else sources_of(held_out),
                other_texts=[] if other_texts is None else sources_of(other_texts),
                judge=judge.name if folder_of_judge is None else str(folder_of_judge),
                judge_fingerprint=(
                    None if folder_of_judge is None else fingerprint(folder_of_judge)
                ),
                **facts,
            )
            publish(work, target, overwrite)
        this_process().wait_for_everyone()
    return target


Numbered = list[tuple[PromptRow, list[int]]]


def _read(
    prompts: Texts,
    held_out: Texts | None,
    judge: Judge,
    vocabulary: Vocabulary,
    settings: ReinforceSettings,
) -> tuple[Numbered, Numbered]:
    """What is answered to learn and to evaluate, each with its tokens."""

    def read(texts: Texts) -> list[PromptRow]:
        rows = read_prompt_rows(texts, skip_bad_rows=settings.skip_bad_rows)
        good = []
        for row in rows:
            try:
                judge.check(row)
            except TextError:
                if not settings.skip_bad_rows:
                    raise
                continue
            good.append(row)
        if len(good) < len(rows):
            _log.warning(
                "%d of %d prompts are passed over: the judge %s cannot check their answers",
                len(rows) - len(good),
                len(rows),
                judge.name,
            )
        if not good:
            raise TextError(f"the judge {judge.name} can check the answers to none of the prompts")
        return good

    learned, judged = divided(
        read(prompts), None if held_out is None else read(held_out), settings.held_out_share
    )
    room = settings.max_length - settings.max_new_tokens
    return (
        _short(learned, vocabulary, room, "the prompts to learn from"),
        _short(judged[: settings.held_out_prompts], vocabulary, room, "the held-out prompts"),
    )


def _short(rows: Sequence[PromptRow], vocabulary: Vocabulary, room: int, name: str) -> Numbered:
    numbered: Numbered = []
    for row in rows:
        try:
            refuse_unwritten(row.prompt, vocabulary)
            numbered.append((row, prompt_ids(row.prompt, vocabulary)))
        except TextError as error:
            raise TextError(f"{row.origin}: {error}") from error
    short = [(row, ids) for row, ids in numbered if len(ids) <= room]
    if not short:
        raise TextError(
            f"none of the {len(rows)} rows of {name} has at most {room} tokens, which "
            "max_length leaves beside max_new_tokens; raise max_length"
        )
    if len(short) < len(numbered):
        _log.warning(
            "%d of %d rows of %s are left out: they are longer than the %d tokens that "
            "max_length leaves beside max_new_tokens",
            len(numbered) - len(short),
            len(numbered),
            name,
            room,
        )
    return short


def _digest(rows: Numbered) -> str:
    text = json.dumps([[ids, sorted(map(str, row.columns.items()))] for row, ids in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _train(
    work: Path,
    info: FolderInfo,
    base: str,
    vocabulary: Vocabulary,
    learned: Numbered,
    judged: Numbered,
    other: OtherText | None,
    judge: Judge,
    settings: ReinforceSettings,
) -> dict[str, Any]:
    """Train, evaluate, gather in ``work/result`` what the target will hold, and say what it is.

    Processes that do not write have nothing to say.
    """
    from mistill.pytorch.loading import load_pytorch
    from mistill.pytorch.writing import REPLIES_AT_ONCE
    from tune.policy.training import Prompts, judged_answers, policy_figures, policy_trainer
    from tune.trainers.arguments import between_evaluations, step_total
    from tune.trainers.ending import end_as_trained, load_to_look_at, merged_end
    from tune.trainers.placing import computes_in_bfloat16, load_base, type_of_base
    from tune.trainers.running import run_trainer
    from tune.trainers.shares import in_shares

    # Each step answers batch_size / samples prompts.
    steps = step_total(settings, len(learned) * settings.samples)
    every = between_evaluations(settings.evaluate_every, steps)
    device = this_process().device
    low = computes_in_bfloat16(settings, device)
    dtype = type_of_base(settings.base, device, low_precision=low)
    model: Any = load_base(info, settings.base, dtype, device)
    start: list[Any] = []

    def start_model() -> Any:
        if not start:
            came: Any = load_pytorch(info.path)
            start.append(came.to(device))
        return start[0]

    held_out = Prompts([row for row, _ in judged], [ids for _, ids in judged])
    trainer = policy_trainer(
        model,
        info.path,
        vocabulary,
        Prompts([row for row, _ in learned], [ids for _, ids in learned]),
        judge,
        start_model,
        settings,
        work,
        steps=steps,
        checkpoint_every=settings.checkpoint_every or every,
    )

    def answered(one: Any, numbers: Sequence[int]) -> Any:
        most = settings.max_new_tokens
        return judged_answers(one, held_out, numbers, judge, vocabulary, most)

    def evaluate(step: int) -> dict[str, float]:
        return policy_figures(
            in_shares(
                range(len(judged)), lambda some: answered(trainer.model, some), REPLIES_AT_ONCE
            )
        )

    def measured(one: Any) -> dict[str, float]:
        return policy_figures(answered(one, range(len(judged))))

    def stop(logs: Mapping[str, float]) -> str | None:
        moved = logs.get("kl_from_start", 0.0)
        if moved <= settings.max_kl:
            return None
        return (
            f"the KL divergence from the start is {moved:.3f} nats a token, above max_kl "
            f"({settings.max_kl:g}); raise beta or max_kl, or lower learning_rate"
        )

    run = run_trainer(
        trainer,
        work,
        steps=steps,
        what=f"reinforcement ({settings.method})",
        evaluate=evaluate,
        every=every,
        keep=settings.keep,
        stop=stop,
    )
    _refuse_no_better(work, run)
    if not this_process().is_main_process:
        return {}
    if settings.base == "float":
        end = end_as_trained(run, trainer.model)
    else:
        end = merged_end(
            work,
            info,
            run,
            trainer.model,
            base,
            settings,
            dtype,
            before=run.judged[0]
            if info.form == "nf4"
            else measured(load_to_look_at(info.path, device)),
            measure=measured,
        )
    rows = (len(learned), len(judged))
    return _finish(work, info, base, run, end, judge.name, rows, other, start_model, settings)


def _refuse_no_better(work: Path, run: Run) -> None:
    """Say what kept the model from learning, and refuse it where it is no better."""
    from mistill.training.metrics import METRICS_FILE
    from tune.trainers.running import emptied, metric_means

    last = run.judged[max(run.judged)]
    if this_process().is_main_process:
        _warn(metric_means(work / METRICS_FILE), last)
    if run.kept_step == 0:
        emptied(work)
        raise TrainingError(
            f"the model got no better: its held-out reward was {run.judged[0]['reward']:.4f} "
            f"before and {last['reward']:.4f} after {run.steps} steps; give it more steps or "
            "samples, another learning_rate, or prompts of which it answers some well"
        )


def _finish(
    work: Path,
    info: FolderInfo,
    base: str,
    run: Run,
    end: End,
    judge: str,
    rows: tuple[int, int],
    other: OtherText | None,
    start_model: Callable[[], Any],
    settings: ReinforceSettings,
) -> dict[str, Any]:
    from mistill.training.metrics import METRICS_FILE
    from tune.trainers.ending import facts_of, write_end
    from tune.trainers.moved import forgetting
    from tune.trainers.running import metric_means
    from tune.trainers.tuned_folder import write_report

    means = metric_means(work / METRICS_FILE)
    report = {
        "method": settings.method,
        "judge": judge,
        "rows": {"learned": rows[0], "held_out": rows[1]},
        **end.told,
        "kl_from_start": means.get("last kl_from_start"),
        "other_text": forgetting(end.model, start_model, other),
        "groups_without_variance": means.get("frac_reward_zero_std"),
        "answers_cut_off": means.get("completions/clipped_ratio"),
        **facts_of(run),
        "stopped": run.stopped,
    }
    write_end(work, info, base, end, settings)
    write_report(work / "result", report)
    told = (
        *(*end.told, "kl_from_start", "other_text"),
        *("steps", "kept_step", "steps_done_again", "processes", "stopped"),
    )
    return {name: report[name] for name in told}


def _warn(means: Mapping[str, float], last: Mapping[str, float]) -> None:
    """Say what kept the model from learning."""
    alike = means.get("frac_reward_zero_std", 0.0)
    if alike > _MANY_ALIKE:
        _log.warning(
            "in %.0f%% of the groups all answers had the same reward and taught nothing; give "
            "prompts of which the model answers some well and others badly, a reward with more "
            "steps, more samples, or a higher temperature",
            100 * alike,
        )
    cut = means.get("completions/clipped_ratio", 0.0)
    if cut > _MANY_CUT:
        _log.warning(
            "%.0f%% of the answers were cut off and taught nothing; raise max_new_tokens, or ask "
            "for shorter answers in the prompts",
            100 * cut,
        )
    if last["truncated"] > _MANY_CUT:
        _log.warning(
            "%.0f%% of the held-out answers were cut off after the last step, so that their "
            "reward is that of a beginning",
            100 * last["truncated"],
        )
