"""Bytes of llama.cpp's Q4_K_M, against files that llama.cpp wrote."""

from __future__ import annotations

from quantize.mixed.q4_k_m import q4_k_m_bytes

Shape = tuple[int, int]


def matrices_of(
    layers: int, hidden: int, intermediate: int, key_values: int
) -> dict[str, tuple[int, int]]:
    shapes: dict[str, Shape] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_values),
        "self_attn.v_proj": (hidden, key_values),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def test_smollm2_takes_the_bytes_that_llama_quantize_wrote():
    # The tensors of the Q4_K_M file that llama-quantize makes of SmolLM2-135M-Instruct. Most of its
    # rows are no multiple of 256, so that other types take over.
    matrices = matrices_of(layers=30, hidden=576, intermediate=1536, key_values=192)
    tables = {"embed_tokens": (576, 49152)}
    assert q4_k_m_bytes(matrices, tables, other_values=61 * 576) == 103_668_480


def test_mistral_7b_takes_what_its_published_file_has():
    # mistral-7b-instruct-v0.2.Q4_K_M.gguf has 4,368,439,584 bytes; 0.7 MB are its vocabulary.
    matrices = matrices_of(layers=32, hidden=4096, intermediate=14336, key_values=1024)
    tables = {"embed_tokens": (4096, 32000), "lm_head": (4096, 32000)}
    tensors = q4_k_m_bytes(matrices, tables, other_values=65 * 4096)
    assert 4_366_000_000 < tensors < 4_368_439_584


def test_rows_that_no_block_divides_stay_in_sixteen_bits():
    matrices = {"model.layers.0.mlp.up_proj": (20, 3)}
    assert q4_k_m_bytes(matrices, {"embed_tokens": (20, 5)}, other_values=2) == 8 + 120 + 200
