"""A comparison made by hand: seven stops of a road, with figures as real ones have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.figures.comparison import ScoredText
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.footprint import Footprint
from benchmarks.figures.latency import Latency, Turn
from benchmarks.figures.machine import Machine
from benchmarks.figures.model_result import ModelResult
from benchmarks.figures.perplexity import Perplexity
from benchmarks.report.report import Report
from benchmarks.settings import BenchSettings

# name, form, megabytes, millions of weights, loss, KL, tokens/s, tokens/s of transformers
ROAD: tuple[tuple[Any, ...], ...] = (
    ("teacher", "model", 538, 134, 2.10, None, 21, 17),
    ("pruned", "model", 425, 106, 3.90, 1.34, 29, 23),
    ("student", "model", 425, 106, 2.72, 0.55, 29, 23),
    ("student-nf4", "nf4", 96, 106, 2.79, 0.61, 6, None),
    ("chatbot-float", "onnx", 425, 106, 2.72, 0.55, 44, None),
    ("chatbot-8", "onnx", 116, 106, 2.72, 0.551, 96, None),
    ("chatbot-4", "onnx", 74, 106, 2.80, 0.60, 131, None),
)
STEPS = (
    {"step": "teacher", "settings": {"source": "@smollm2"}},
    {"step": "student", "settings": {"layers": 22, "choose": "influence"}},
    {"step": "distill", "settings": {"tokens": 30000, "temperature": 1.0}},
    {"step": "quantize gptq", "settings": {"bits": 4, "group_size": 64}},
    {"step": "export", "settings": {"precision": "auto", "head_bits": 8}},
)


def made_comparison(reference: str = "teacher", count: int = 7, samples: bool = True) -> Report:
    random = np.random.default_rng(0)
    return Report(
        date="2026-11-22T10:00:00+00:00",
        duration_seconds=97.3,
        settings=BenchSettings(threads=2),
        machine=Machine(
            processor="AMD EPYC 7763",
            instructions=("avx2", "fma"),
            cores=2,
            processors=2,
            usable_processors=2,
            threads=2,
            memory_bytes=24 << 30,
            system="Linux 6.1",
            governor=None,
            virtual=True,
            load_average=0.12,
            versions={"python": "3.11.9", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        ),
        text=ScoredText(
            sources=("@demo-held-out",),
            fingerprint="0f" * 32,
            passages=20,
            tokens_read=520,
            tokens_scored=400,
        ),
        reference=reference,
        models=tuple(made_model(random, *row) for row in ROAD[:count]),
        samples={
            "What is a <mistral>?": {
                "teacher": "A strong, cold wind\nthat blows through the Rhône valley.",
                "pruned": "A mistral mistral is a is",
                "student": "A mistral is a cold wind from the north & it is strong.",
            }
        }
        if samples
        else {},
    )


def made_model(
    random: np.random.Generator,
    name: str,
    form: str,
    megabytes: float,
    millions: float,
    loss: float,
    kl: float | None,
    speed: float,
    rival: float | None,
) -> ModelResult:
    def nested(mean: float) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(round(float(x), 6) for x in random.gamma(2, mean / 2, 20)) for _ in range(20)
        )

    def latency(rate: float) -> Latency:
        return Latency(
            turns=tuple(
                Turn(
                    prompt_tokens=128,
                    first_token_seconds=8 / rate * slower,
                    token_seconds=(slower / rate,) * 47,
                )
                for slower in (1.0, 1.06, 0.97)
            )
        )

    return ModelResult(
        name=name,
        form=form,
        architecture="llama",
        layers=30 if name == "teacher" else 22,
        hidden_size=576,
        lineage=STEPS[: {"teacher": 1, "pruned": 2, "student": 3}.get(name, 5)],
        fingerprint="ab" * 32,
        footprint=Footprint(
            parameters=int(millions * 1e6),
            weight_bytes=int(megabytes * 1e6),
            folder_bytes=int((megabytes + 4) * 1e6),
            load_seconds=0.4,
            peak_memory_bytes=int((megabytes + (80 if form == "onnx" else 420)) * 1e6),
            resident_memory_bytes=int((megabytes + 70) * 1e6),
        ),
        perplexity=Perplexity(losses=nested(loss)),
        fidelity=None
        if kl is None
        else Fidelity(
            divergences=nested(kl),
            agreements=tuple(
                tuple(int(x) for x in random.random(20) < np.exp(-kl)) for _ in range(20)
            ),
        ),
        parent=None,
        parent_fidelity=None,
        latency=latency(speed),
        transformers_latency=None if rival is None else latency(rival),
    )
