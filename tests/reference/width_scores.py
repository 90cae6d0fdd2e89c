"""Activation magnitudes written out from the weights, one position at a time, in float64.

Only the plain case: every block is one document that fills it, no biases, no window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Vector = np.ndarray[Any, Any]


def width_scores(model: Any, blocks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Scores of neurons, key/value groups and channels."""
    config = model.config
    total = config.num_hidden_layers
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rotary = model.model.rotary_emb
    neurons: list[list[Vector]] = [[] for _ in range(total)]
    lengths: list[list[Vector]] = [[] for _ in range(total)]
    channels: list[list[Vector]] = [[] for _ in range(2 * total + 1)]

    def matrix(module: Any) -> Vector:
        values: Vector = module.weight.detach().double().numpy()
        return values

    for ids in blocks:
        count = len(ids)
        x = matrix(model.model.embed_tokens)[list(ids)]
        cos, sin = (
            part[0].double().numpy() for part in rotary(torch.zeros(1), torch.arange(count)[None])
        )

        def turned(vector: Vector, place: int, cos: Vector = cos, sin: Vector = sin) -> Vector:
            half = size // 2
            crossed = np.concatenate([-vector[half:], vector[:half]])
            return np.asarray(vector * cos[place] + crossed * sin[place])

        def norm(x: Vector, weight: Vector, number: int) -> Vector:
            out = np.stack(
                [
                    weight * row / math.sqrt(float(np.mean(row**2)) + config.rms_norm_eps)
                    for row in x
                ]
            )
            channels[number].append(np.abs(out).mean(axis=0))
            return out

        for number, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = norm(x, matrix(layer.input_layernorm), 2 * number)
            q, k, v = (
                (h @ matrix(part).T).reshape(count, -1, size)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = np.zeros((count, heads, size))
            for place in range(count):
                for head in range(heads):
                    group = head * groups // heads
                    query = turned(q[place, head], place)
                    scores = np.array(
                        [query @ turned(k[past, group], past) for past in range(place + 1)]
                    )
                    weights = np.exp((scores - scores.max()) / math.sqrt(size))
                    weights /= weights.sum()
                    out[place, head] = weights @ v[: place + 1, group]
            parts = out.reshape(count, groups, -1)
            lengths[number].append(np.sqrt((parts**2).sum(axis=-1)).mean(axis=0))
            x = x + out.reshape(count, -1) @ matrix(attention.o_proj).T
            h = norm(x, matrix(layer.post_attention_layernorm), 2 * number + 1)
            gate, up = h @ matrix(mlp.gate_proj).T, h @ matrix(mlp.up_proj).T
            inner = gate / (1 + np.exp(-gate)) * up
            neurons[number].append(np.abs(inner).mean(axis=0))
            x = x + inner @ matrix(mlp.down_proj).T
        norm(x, matrix(model.model.norm), 2 * total)

    def root(blocks: list[Vector]) -> Vector:
        return np.asarray(np.sqrt(sum(block**2 for block in blocks)))

    return {
        "neurons": np.stack([root(part) for part in neurons]),
        "groups": np.stack([root(part) for part in lengths]),
        "channels": np.asarray(sum(root(part) for part in channels)),
    }
