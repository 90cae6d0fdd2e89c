"""Settings of the export refuse nonsense when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from export.settings import OnnxSettings
from mistill.errors import SettingsError


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"precision": "int5"}, "auto, float32, float16, int8 or int4"),
        ({"head_bits": 16}, "head_bits must be 4, 8 or 32"),
        ({"embedding_bits": 0}, "embedding_bits must be 4, 8 or 32"),
        ({"block_size": 24}, "16, 32, 64, 128 or 256"),
        ({"accuracy_level": 1}, "accuracy_level must be 4"),
        ({"context_length": 0}, "at least 1"),
        ({"parity_positions": 1}, "0 or at least 2"),
        ({"parity_positions": -1}, "0 or at least 2"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(option: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        OnnxSettings(**option)


def test_blocks_left_out_depend_on_the_bits() -> None:
    assert [OnnxSettings().largest_block(bits) for bits in (4, 8)] == [64, 32]
    assert [OnnxSettings(block_size=16).largest_block(bits) for bits in (4, 8)] == [16, 16]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "float16", "activations": "float32"}, "precision float16 .* same type"),
        ({"precision": "float32", "activations": "float16"}, "precision float32 .* same type"),
        ({"activations": "bfloat16"}, "activations must be float32 or float16"),
        ({"activations": "float16", "portable": True}, "float16 do not go with portable"),
        ({"activations": "float16", "layout": "transformersjs"}, "leave it at mistill"),
        ({"activations": "float16", "cache": "int8"}, "the KV cache becomes float16"),
        ({"activations": "float16", "float_columns": 4}, "do not go with float_columns"),
        ({"activations": "float16", "tune_for": "here"}, "do not go with tune_for"),
    ],
    ids=str,
)
def test_half_precision_is_refused_where_nothing_computes_in_it(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        OnnxSettings(**options)


def test_the_type_of_activations_follows_the_precision() -> None:
    assert OnnxSettings().activation_type == "float32"
    assert OnnxSettings(precision="float16").activation_type == "float16"
    assert OnnxSettings(precision="int4", activations="float16").activation_type == "float16"
