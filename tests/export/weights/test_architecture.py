"""What a config.json says reaches the graph, or is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.weights.architecture import read_architecture, require_graph, rotary_tables
from mistill.errors import ArchitectureError

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_tables_are_those_of_transformers(rope: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**PLAIN, rope_parameters=rope)
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(400)[None])
    ours = rotary_tables(read_architecture({**PLAIN, "rope_parameters": rope}).frequencies, 400)
    # transformers repeats each angle for the second half of a head.
    assert np.allclose(ours[0], cosine[0, :, :8].numpy(), atol=1e-4, rtol=0)
    assert np.allclose(ours[1], sine[0, :, :8].numpy(), atol=1e-4, rtol=0)


def test_older_names_of_rotary_settings_mean_the_same() -> None:
    newer = read_architecture({**PLAIN, "rope_parameters": LLAMA3})
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    older = read_architecture({**PLAIN, "rope_theta": 500000.0, "rope_scaling": scaling})
    oldest = {**scaling, "type": scaling.pop("rope_type")}
    oldest.pop("rope_type")
    oldest_read = read_architecture({**PLAIN, "rope_theta": 500000.0, "rope_scaling": oldest})
    assert np.array_equal(newer.frequencies, older.frequencies)
    assert np.array_equal(newer.frequencies, oldest_read.frequencies)


def test_what_a_config_leaves_out_has_the_value_of_the_architecture() -> None:
    config = dict(PLAIN)
    del config["num_key_value_heads"]
    read = read_architecture(config)
    assert (read.kv_heads, read.head_dim, read.norm_epsilon) == (4, 16, 1e-6)
    assert (read.sliding_window, read.tied) == (None, False)
    assert np.isclose(read.frequencies[1], 10_000 ** (-2 / 16))


def test_only_a_mistral_has_a_window() -> None:
    mistral = {**PLAIN, "model_type": "mistral", "sliding_window": 7}
    assert read_architecture(mistral).sliding_window == 7
    assert read_architecture({**mistral, "sliding_window": None}).sliding_window is None
    assert read_architecture({**mistral, "model_type": "llama"}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "only a part of each head"),
    ],
    ids=str,
)
def test_what_the_graph_cannot_say_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        read_architecture({**PLAIN, **change})


def test_heads_that_the_operators_cannot_read_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="model's is 24"):
        require_graph(read_architecture({**PLAIN, "head_dim": 24}))
