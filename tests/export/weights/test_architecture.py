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


# --- what transformers makes of the same config -------------------------------------------------

# Heads of each width that the defaults of all classes allow.
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3_ALONE = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
# Entries that are left out, entries that are null, and other names for the same thing.
SPELLINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "as it is": ((), {}),
    "no key-value heads": (("num_key_value_heads",), {}),
    "null key-value heads": ((), {"num_key_value_heads": None}),
    "no heads": (("num_attention_heads", "num_key_value_heads"), {"hidden_size": 4096}),
    "no positions": (("max_position_embeddings",), {}),
    "no intermediate size": (("intermediate_size",), {}),
    "no layers": (("num_hidden_layers",), {}),
    "no vocabulary": (("vocab_size",), {}),
    "a base outside": ((), {"rope_theta": 7e5}),
    "a base inside": ((), {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}),
    "a base inside alone": ((), {"rope_parameters": {"rope_theta": 7e5}}),
    "both bases": ((), {"rope_theta": 9e5, "rope_parameters": {"rope_theta": 7e5}}),
    "an old scale": ((), {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "a base in the old scale": (
        (),
        {"rope_theta": 9e5, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 7e5}},
    ),
    "both scales": (
        (),
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5},
        },
    ),
    "null scale": ((), {"rope_scaling": None, "rope_theta": 7e5}),
    "empty scale": ((), {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7e5}}),
    "a factor without a type": ((), {"rope_parameters": {"factor": 4.0, "rope_theta": 7e5}}),
    "llama3": ((), {"rope_theta": 5e5, "rope_scaling": LLAMA3_ALONE}),
    "llama3 of the context": (
        (),
        {
            "rope_parameters": {
                name: value
                for name, value in LLAMA3.items()
                if name != "original_max_position_embeddings"
            }
        },
    ),
    "another epsilon": ((), {"rms_norm_eps": 1e-5}),
    "an older type": ((), {"torch_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_config_means_what_it_means_to_transformers(kind: str, spelling: str) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    removed, changes = SPELLINGS[spelling]
    config = {name: value for name, value in SIZES.items() if name not in removed} | changes
    if kind == "mistral" and spelling == "null key-value heads":
        pytest.skip("transformers does not build it")
    theirs: Any = AutoConfig.for_model(kind, **config)
    ours = read_architecture({"model_type": kind, **config})
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    for name, value in {
        "vocab_size": ours.vocabulary_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "num_key_value_heads": ours.kv_heads,
        "max_position_embeddings": ours.max_positions,
        "rms_norm_eps": ours.norm_epsilon,
        "tie_word_embeddings": ours.tied,
    }.items():
        assert getattr(theirs, name) == value, name
    window = theirs.sliding_window if kind == "mistral" else None
    assert ours.sliding_window == window
    theirs.head_dim = ours.head_dim
    expected = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    np.testing.assert_allclose(ours.frequencies, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("llama", {"sliding_window": 7}, None),
        ("qwen2", {"sliding_window": 7}, None),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, None),  # from layer 28 on
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, None),  # 4096 of 512
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}, None),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 4,
            },
            7,
        ),
        ("smollm3", {"use_sliding_window": True}, None),
        ("smollm3", {"sliding_window": 7}, None),
        (
            "smollm3",
            {"sliding_window": 7, "use_sliding_window": True, "no_rope_layers": [0, 0, 0, 0]},
            7,
        ),
    ],
    ids=str,
)
def test_a_window_is_that_of_transformers(
    kind: str, changes: dict[str, Any], window: int | None
) -> None:
    from transformers import AutoConfig

    ours = read_architecture({"model_type": kind, **SIZES, **changes}).sliding_window
    assert ours == window
    if kind in ("llama", "mistral"):
        return
    theirs = AutoConfig.for_model(kind, **SIZES, **changes)
    windows = {
        theirs.sliding_window if layer == "sliding_attention" else None
        for layer in theirs.layer_types
    }
    assert {min(one or 512, 512) for one in windows} == {window or 512}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
        ),
        ("smollm3", {"sliding_window": 7, "use_sliding_window": True}),
        (
            "smollm3",
            {"sliding_window": 7, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        ),
    ],
)
def test_windows_in_some_layers_only_are_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="in some layers only"):
        read_architecture({"model_type": kind, **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json should be a number, not None"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json should be a whole"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers .* from 1 to 10000"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"head_dim": 7}, "heads 7 wide cannot be rotated in pairs"),
        ({"head_dim": 16.5}, "head_dim"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": "linear"}, "one rotary embedding for all layers"),
        ({"rope_scaling": {"type": "linear"}}, "factor in config.json should be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "is 0"),
        ({"rope_scaling": {"type": None, "factor": 2}}, "uses None"),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": None}},
            "low_freq_factor in config.json should be a number",
        ),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "should be below"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "one rotary embedding for all layers",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings in config.json should be true or"),
        ({"per_layer_config": {"0": {}}}, "layers differ in their config"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["x"]},
            "each of 2 layers",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"model_type": ["llama"]}, "this one is"),
    ],
    ids=str,
)
def test_values_that_are_none_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    window = {"sliding_window": 8} if "model_type" in changes else {}
    with pytest.raises(ArchitectureError, match=words):
        read_architecture({**PLAIN, **window, **changes})
