"""Run in the environment of interop_environment.py: logits of GPTQ folders by gptqmodel.

Arguments: a file of ids (.npy), then folders. Each folder is loaded twice. ``default.npy`` in it
is what a user gets, left out after the word ``exact``. ``exact.npy`` comes from gptqmodel's plain
kernel with its scales in float32, since otherwise it multiplies code and scale in float16, or
everything in bfloat16.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it counts on more than two processors

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTQConfig

ids = torch.from_numpy(np.load(sys.argv[1]))
only_exact = "exact" in sys.argv[2:3]
for folder in map(Path, sys.argv[3 if only_exact else 2 :]):
    models = {}
    if not only_exact:
        models["default"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    exact = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=GPTQConfig(bits=config["bits"], backend="gptq_torch"),
    )
    models["exact"] = exact
    for module in exact.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
    with torch.no_grad():
        for name, model in models.items():
            quantized = [m for m in model.modules() if hasattr(m, "qweight")]
            assert len(quantized) == 7 * model.config.num_hidden_layers, len(quantized)
            np.save(folder / f"{name}.npy", model(ids).logits.float().numpy())
