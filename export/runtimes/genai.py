"""The document by which onnxruntime-genai opens an ONNX folder too."""

from __future__ import annotations

from typing import Any

from export.settings import MODEL_FILE
from export.weights.architecture import Architecture
from mistill.text.vocabulary import Vocabulary

GENAI_FILE = "genai_config.json"


def genai_config(
    architecture: Architecture,
    vocabulary: Vocabulary,
    context_length: int,
    padding_id: int | None,
    *,
    in_place: bool = True,
) -> dict[str, Any]:
    """What ``genai_config.json`` says.

    Args:
        architecture: Architecture of the decoder.
        vocabulary: Vocabulary of the model.
        context_length: The most positions of a text.
        padding_id: The token that fills rows of a batch; None takes the first that ends a text.
        in_place: Whether the graph extends its keys and values where they are.

    Returns:
        The document.
    """
    ends = list(vocabulary.end_ids)
    model: dict[str, Any] = {
        "type": architecture.model_type,
        "vocab_size": architecture.vocabulary_size,
        "context_length": context_length,
        "pad_token_id": padding_id if padding_id is not None else (ends or [0])[0],
        "decoder": {
            "filename": MODEL_FILE,
            # 3 hides a warning that first_logit, an input with a default, is not a constant.
            "session_options": {
                "log_id": "onnxruntime-genai",
                "log_severity_level": 3,
                "provider_options": [],
            },
            "hidden_size": architecture.hidden_size,
            "head_size": architecture.head_dim,
            "num_attention_heads": architecture.heads,
            "num_key_value_heads": architecture.kv_heads,
            "num_hidden_layers": architecture.layers,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if vocabulary.bos_id is not None:
        model["bos_token_id"] = vocabulary.bos_id
    if ends:
        model["eos_token_id"] = ends
    return {
        "model": model,
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "past_present_share_buffer": in_place,
        },
    }
