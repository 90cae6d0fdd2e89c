"""The form of every program's table: its JSON document in, lines of Markdown out.

A form shows what the document holds and nothing else; what it means is for the prose around it.
Forms are in ``step_tables``, ``engine_tables`` and ``serving_tables``; ``benchmarks.suite.page``
says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.suite import engine_tables as engine
from benchmarks.suite import step_tables as step
from benchmarks.suite.cells import Found
from benchmarks.suite.serving_tables import serving

FORMS: dict[str, Callable[[Found], list[str]]] = {
    form.__name__: form
    for form in (
        *(step.loss_head, step.training_step, step.products, step.healing, step.compressing),
        *(step.training_curve, step.few_bits, step.scale_tuning),
        *(step.quantized_kl, step.against_q4_k_m, step.onnxruntime_quantizers),
        *(step.nf4_codec, step.big_model, step.big_layer),
        *(step.json_replies, step.align_then_distil),
        *(engine.export_time, engine.export_parity, engine.step_time, engine.later_turn),
        *(engine.speculation, engine.rivals, engine.comparison, engine.quoted_perplexity),
        *(engine.same_twice, engine.rival_tools, engine.big_chatbot, engine.laptop),
        *(engine.korean_tokens, serving),
    )
}
