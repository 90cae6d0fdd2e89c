"""Whether two reports can be compared, and what else differs between them.

A speed holds for one machine and number of threads, a perplexity for one text. Where these differ,
a change of the figure says nothing about the model, and none is reported.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.figures.comparison import Comparison
from benchmarks.figures.latency import Latency

#: Load average per processor above which the speeds of a report are doubtful.
_BUSY = 0.5


def obstacles_between(old: Comparison, new: Comparison) -> dict[str, str]:
    """Why some figures cannot be compared.

    Args:
        old: A comparison.
        new: A later one.

    Returns:
        Nature of the figures to the reason, which begins with what is not compared and a colon;
        natures that can be compared are left out.
    """
    machine = _other_machine(old, new)
    text = reference = ""
    if old.text.fingerprint != new.text.fingerprint:
        text = f"quality is not compared: another text ({_text_of(old)}, then {_text_of(new)})"
        reference = text
    elif _reference(old) != _reference(new):
        difference = (
            f"another reference ({old.reference}, then {new.reference})"
            if old.reference != new.reference
            else f"{old.reference} is another model than it was"
        )
        reference = f"the distance from the reference is not compared: {difference}"
    obstacles = {
        "clock": machine or _other_turns(old, new),
        "memory": machine,
        "text": text,
        "reference": reference,
    }
    return {nature: reason for nature, reason in obstacles.items() if reason}


def _other_machine(old: Comparison, new: Comparison) -> str:
    for name, difference in (
        ("processor", "another processor"),
        ("instructions", "other vector instructions"),
        ("threads", "other threads"),
        ("usable_processors", "other processors to be used"),
        ("governor", "another frequency governor"),
    ):
        values = getattr(old.machine, name), getattr(new.machine, name)
        if values[0] != values[1]:
            first, second = (
                " ".join(value) if isinstance(value, tuple) else str(value) for value in values
            )
            return f"speed and memory are not compared: {difference} ({first}, then {second})"
    return ""


def _other_turns(old: Comparison, new: Comparison) -> str:
    for name in ("prompt_tokens", "new_tokens", "provider"):
        values = getattr(old.settings, name), getattr(new.settings, name)
        if values[0] != values[1]:
            return f"speed is not compared: {name} was {values[0]}, then {values[1]}"
    return ""


def _text_of(comparison: Comparison) -> str:
    text = comparison.text
    return f"{text.tokens_scored:,} tokens of {', '.join(text.sources)}"


def _reference(comparison: Comparison) -> str:
    """Identifies the reference: its fingerprint where it is known, else its name."""
    for model in comparison.models:
        if model.name == comparison.reference:
            return model.fingerprint
    return comparison.reference_fingerprint or comparison.reference


def notes(old: Comparison, new: Comparison, names: Mapping[str, str]) -> list[str]:
    """What else a reader of the differences should know.

    Args:
        old: A comparison.
        new: A later one.
        names: Name of each model in the old one to its name in the new one.

    Returns:
        Sentences without capital and full stop.
    """
    sentences = []
    before, after = old.machine.versions, new.machine.versions
    versions = [
        f"{name} {before.get(name, 'not installed')}, then {after.get(name, 'not installed')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if versions:
        sentences.append(f"versions: {'; '.join(versions)}")
    if old.machine.system != new.machine.system:
        sentences.append(f"system: {old.machine.system}, then {new.machine.system}")
    for side, comparison in (("old", old), ("new", new)):
        load, width = comparison.machine.load_average, comparison.machine.usable_processors
        if load is not None and load > _BUSY * width:
            sentences.append(
                f"the machine was busy when the {side} report began: load average {load:.1f} on "
                f"{width} processors"
            )
    pairs = [(old[first], new[second]) for first, second in names.items()]
    same = [after.name for before, after in pairs if before.fingerprint == after.fingerprint]
    if same:
        all_same = len(same) == len(pairs)
        sentences.append(
            "every model is the same folder in both"
            if all_same
            else f"the same folder in both: {', '.join(same)}"
        )
    return sentences


def machine_drift(old: Comparison, new: Comparison, names: Mapping[str, str]) -> tuple[float, str]:
    """How much the machine itself has become faster or slower between two reports.

    Another engine of the same version on the same weights is as fast as it was. Where its speed
    changed, the machine did.

    Args:
        old: A comparison.
        new: A later one.
        names: Name of each model in the old one to its name in the new one.

    Returns:
        The largest such change, as a share, and a note on it; 0 and an empty note where the reports
        share no such engine.
    """
    versions = old.machine.versions, new.machine.versions
    same_library = all(versions[0].get(n) == versions[1].get(n) for n in ("torch", "transformers"))
    ratios = {}
    for first, second in names.items():
        before, after = old[first], new[second]
        if before.fingerprint != after.fingerprint:
            continue
        pairs: dict[str, tuple[Latency | None, Latency | None]] = {}
        if same_library:
            latencies = before.transformers_latency, after.transformers_latency
            pairs[f"transformers on {second}"] = latencies
        if before.rival is not None and before.rival == after.rival:
            pairs[second] = before.latency, after.latency
        for engine, (one, other) in pairs.items():
            if one is not None and other is not None:
                ratio = other.decode_tokens_per_second / one.decode_tokens_per_second
                ratios[engine] = abs(ratio - 1)
    if not ratios:
        return 0.0, ""
    engine = max(ratios, key=ratios.__getitem__)
    largest = ratios[engine]
    return largest, (
        f"the machine itself: the speed of {engine}, whose version and weights are the same, "
        f"changed by {largest:.1%}; smaller changes of speed are not reported"
    )
