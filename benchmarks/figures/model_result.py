"""The result for one model, and how it is read back from a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.figures.answers import Answers
from benchmarks.figures.conventions import QuotedPerplexity
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.footprint import Footprint, Load, StepBytes
from benchmarks.figures.latency import Latency, LatencyAt
from benchmarks.figures.perplexity import Perplexity
from benchmarks.figures.replies import Replies
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
        replies: Its replies to everyday prompts, if those were requested.
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
    replies: Replies | None = None

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
