"""The result for one model, and how it is read back from a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.figures.answers import Answers
from benchmarks.figures.conventions import QuotedPerplexity
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.footprint import Footprint, Load, StepBytes
from benchmarks.figures.latency import Latency, LatencyAt, Turn
from benchmarks.figures.perplexity import Perplexity
from benchmarks.figures.rival import Rival


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """The result of a comparison for one model.

    Attributes:
        name: The shortest end of its path that distinguishes it from the others.
        form: ``model`` (float weights), ``gptq``, ``nf4`` or ``onnx``; of a rival the engine.
        architecture: Such as ``mistral``.
        layers: Decoder layers.
        hidden_size: Width of the residual stream.
        lineage: The steps that made the folder, first step first.
        fingerprint: SHA-256 of the folder's content, as ``mistill.folders.lineage`` computes it.
        footprint: Size on disk and in memory.
        perplexity: Perplexity on the text.
        fidelity: Distance from the reference; None for the reference itself.
        parent: Name of the compared float model that a quantized or exported one was made from;
            None where there is none.
        parent_fidelity: Distance from that model: the loss by quantization alone.
        latency: Time to the first token of an answer, and for each further one.
        transformers_latency: The same prompts through transformers' own greedy ``generate``, for
            float folders; else None.
        prompts: Turns with prompts of the requested lengths, shortest first.
        depths: Turns that begin to write after so many tokens, fewest first.
        loads: Loading times, each in a process of its own, with cold and with warm files.
        step_bytes: Bytes that a step reads; None where the folder does not record them.
        rival: The other engine that ran the same weights; None for a model of our own.
        left_out: What was not measured although it was requested, and why.
        quoted: Perplexities in the requested conventions.
        answers: Its answers to the small offline set, if those were requested.
    """

    name: str
    form: str
    architecture: str
    layers: int
    hidden_size: int
    lineage: tuple[dict[str, Any], ...]
    fingerprint: str
    footprint: Footprint
    perplexity: Perplexity
    fidelity: Fidelity | None
    parent: str | None
    parent_fidelity: Fidelity | None
    latency: Latency
    transformers_latency: Latency | None
    prompts: tuple[LatencyAt, ...] = ()
    depths: tuple[LatencyAt, ...] = ()
    loads: tuple[Load, ...] = ()
    step_bytes: StepBytes | None = None
    rival: Rival | None = None
    left_out: tuple[str, ...] = ()
    quoted: tuple[QuotedPerplexity, ...] = ()
    answers: Answers | None = None

    @property
    def mean_kl(self) -> float:
        """Mean KL(reference || model) per token in nats; 0 for the reference itself."""
        return 0.0 if self.fidelity is None else self.fidelity.mean_kl

    @property
    def kind(self) -> str:
        """What runs which weights, in two or three words."""
        if self.rival is not None:
            return self.rival.name
        return {
            "model": "PyTorch float",
            "gptq": "PyTorch GPTQ",
            "nf4": "PyTorch NF4",
            "onnx": "ONNX Runtime",
        }[self.form]


def result_from(record: dict[str, Any]) -> ModelResult:
    """Read the result of one model from a report.

    Args:
        record: As ``dataclasses.asdict`` made it, with lists for tuples; what older versions of
            mistill did not keep may be missing, and the derived figures are left aside.

    Returns:
        The result.
    """
    fields = {name: value for name, value in record.items() if name != "summary"}
    rival = fields["transformers_latency"]
    return ModelResult(
        **{
            **fields,
            "lineage": tuple(fields["lineage"]),
            "footprint": Footprint(**fields["footprint"]),
            "perplexity": Perplexity(**with_tuples(fields["perplexity"])),
            "fidelity": _fidelity_from(fields["fidelity"]),
            "parent_fidelity": _fidelity_from(fields["parent_fidelity"]),
            "latency": _latency_from(fields["latency"]),
            "transformers_latency": rival and _latency_from(rival),
            **_optional_from(record),
        }
    )


def _optional_from(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that older reports lack."""
    at_lengths: dict[str, Any] = {
        name: tuple(
            LatencyAt(tokens=entry["tokens"], latency=_latency_from(entry["latency"]))
            for entry in record.get(name, ())
        )
        for name in ("prompts", "depths")
    }
    step_bytes, rival = record.get("step_bytes"), record.get("rival")
    return {
        **at_lengths,
        "loads": tuple(Load(**load) for load in record.get("loads", ())),
        "step_bytes": step_bytes and StepBytes(**step_bytes),
        "rival": rival and Rival(**rival),
        "left_out": tuple(record.get("left_out", ())),
        "quoted": tuple(QuotedPerplexity(**with_tuples(one)) for one in record.get("quoted", ())),
        "answers": record.get("answers") and Answers(**with_tuples(record["answers"])),
    }


def _fidelity_from(record: dict[str, Any] | None) -> Fidelity | None:
    return None if record is None else Fidelity(**with_tuples(record))


def _latency_from(record: dict[str, Any]) -> Latency:
    return Latency(turns=tuple(Turn(**with_tuples(turn)) for turn in record["turns"]))


def with_tuples(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a frozen record, whose lists were tuples.

    Args:
        record: The fields as JSON gives them.

    Returns:
        The same, with tuples for the lists and for those in them.
    """

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in record.items()}
