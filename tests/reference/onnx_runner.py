"""An ONNX folder run in the plainest way: one ``session.run`` per call, caches handed around."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Cache = dict[str, NDArray[np.float32]]


class OnnxRunner:
    """Logits and caches of an ONNX folder; nothing is shared or reused."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.layers = int(decoder["num_hidden_layers"])
        self.shape = (int(decoder["num_key_value_heads"]), int(decoder["head_size"]))

    def empty(self, batch: int) -> Cache:
        heads, width = self.shape
        return {
            f"{layer}.{part}": np.zeros((batch, heads, 0, width), np.float32)
            for layer in range(self.layers)
            for part in ("key", "value")
        }

    def run(
        self, ids: NDArray[np.int64], cache: Cache | None = None, first_logit: int | None = 0
    ) -> tuple[NDArray[np.float32], Cache]:
        """Logits (B, kept, V) of ids (B, T) that follow a cache, and the cache with them."""
        cache = self.empty(len(ids)) if cache is None else cache
        feeds: dict[str, Any] = {f"past_key_values.{name}": value for name, value in cache.items()}
        feeds["input_ids"] = ids
        total = ids.shape[1] + cache["0.key"].shape[2]
        feeds["attention_mask"] = np.ones((len(ids), total), np.int64)
        if first_logit is not None:
            feeds["first_logit"] = np.array([first_logit], np.int64)
        logits, *present = self.session.run(["logits", *(f"present.{n}" for n in cache)], feeds)
        return logits, dict(zip(cache, present, strict=True))

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (B, T, V) of every position of ids (B, T)."""
        return self.run(ids)[0]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most probable continuation, token by token."""
        logits, cache = self.run(np.array([ids]), first_logit=None)
        found: list[int] = []
        for _ in range(count):
            found.append(int(logits[0, -1].argmax()))
            logits, cache = self.run(np.array([[found[-1]]]), cache, first_logit=None)
        return found
