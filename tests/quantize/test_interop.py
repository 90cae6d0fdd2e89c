"""Do our GPTQ folders mean to others what they mean to us?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mistill.pytorch import load_pytorch
from quantize import to_gptq, to_rounding
from tests.quantize.interop_environment import NotInstallable, interop_python

_LOADER = Path(__file__).with_name("load_with_gptqmodel.py")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_transformers_with_optimum_and_gptqmodel_computes_our_logits(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    try:
        python = interop_python()
    except NotInstallable as reason:
        pytest.skip(str(reason))
    folders = [
        to_gptq(
            model,
            tmp_path / f"{bits}-{symmetric}",
            texts=chats,
            bits=bits,
            symmetric=symmetric,
            group_size=32,
            samples=8,
            block_length=64,
        )
        for bits in (4, 8)
        for symmetric in (True, False)
    ]
    folders.append(to_rounding(model, tmp_path / "rows", group_size=-1))
    ids = np.random.default_rng(0).integers(5, 300, (2, 40))
    np.save(tmp_path / "ids.npy", ids)
    done = subprocess.run(
        [python, _LOADER, tmp_path / "ids.npy", *folders],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        with torch.no_grad():
            ours = load_pytorch(folder)(torch.from_numpy(ids)).logits.numpy()
        # The same numbers are multiplied in the same order; a sum may be split in another way.
        np.testing.assert_allclose(np.load(folder / "exact.npy"), ours, rtol=0, atol=1e-4)
        # Kernels in half precision: 8 bits of mantissa, over two layers.
        default = np.load(folder / "default.npy")
        assert np.abs(default - ours).max() < 0.1 * np.abs(ours).max()
