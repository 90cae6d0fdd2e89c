"""Perplexity as people quote it, against those who quote it."""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures.conventions import CONVENTIONS, QuotedPerplexity
from benchmarks.measure.child import Worker
from benchmarks.measure.quoting import check_quotable, cut_texts, quote
from mistill.errors import SettingsError
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.tiny import SENTENCES, tiny_model


def opened(folder: Path) -> Worker:
    worker = Worker(folder, threads=1)
    worker.open()
    return worker


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that holds a window of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("models") / "long"
    return tiny_model(folder, seed=5, model_type="llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    random = np.random.default_rng(0)
    lines = [SENTENCES[place] for place in random.integers(0, len(SENTENCES), 320)]
    file.write_text("\n".join(lines), "utf-8")
    return file


def quoted(folder: Path, texts: Path, name: str) -> QuotedPerplexity:
    (text,) = cut_texts(texts, load_vocabulary(folder), [name], None)
    return quote(opened(folder), text)


def transformers_losses(folder: Path, windows: np.ndarray, first: int) -> list[float]:
    """Transformers' own loss on every window; what comes before a place is not to be predicted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for window in windows:
        ids = torch.from_numpy(window)[None]
        labels = ids.clone()
        labels[:, :first] = -100
        with torch.inference_mode():
            losses.append(float(model(ids, labels=labels).loss))
    return losses


@pytest.mark.parametrize("name", ["gptq", "llama.cpp"])
def test_perplexity_is_that_of_transformers_loss(name: str, long_model: Path, prose: Path):
    length = CONVENTIONS[name].context_length
    ids = np.array(load_vocabulary(long_model).encode(prose.read_text("utf-8")))
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    assert len(windows) > 1
    # GPTQ: every token but the first; llama.cpp: logits from position 256 on.
    losses = transformers_losses(long_model, windows, 1 if name == "gptq" else 257)
    found = quoted(long_model, prose, name)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.window_tokens == ((length - 1 if name == "gptq" else 255),) * len(windows)


def test_bytes_are_those_of_the_predicted_text(long_model: Path, prose: Path):
    vocabulary = load_vocabulary(long_model)
    found = quoted(long_model, prose, "llama.cpp")
    ids = vocabulary.encode(prose.read_text("utf-8"))
    expected = [
        sum(len(vocabulary.token_bytes(token)) for token in ids[start + 257 : start + 512])
        for start in range(0, len(ids) - 511, 512)
    ]
    assert list(found.window_bytes) == expected
    bits = sum(found.window_losses) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / sum(expected))


def test_a_model_with_too_short_a_context_is_refused_in_one_line():
    check_quotable(["llama.cpp"], "model", 512)
    expected = "model has a context of 512 tokens, and perplexity in the convention of gptq"
    with pytest.raises(SettingsError, match=expected):
        check_quotable(["llama.cpp", "gptq"], "model", 512)


def test_too_short_a_text_is_refused_in_one_line(long_model: Path, chats: Path, tmp_path: Path):
    vocabulary = load_vocabulary(long_model)
    expected = "allows 600 tokens, and perplexity in the convention of gptq needs at least 2048"
    with pytest.raises(SettingsError, match=expected):
        cut_texts(chats, vocabulary, ["llama.cpp", "gptq"], 600)
    one = tmp_path / "one.txt"
    one.write_text(SENTENCES[0], "utf-8")
    with pytest.raises(
        SettingsError, match=r"the text has \d+ tokens, and perplexity in the convention of llama"
    ):
        cut_texts(one, vocabulary, ["llama.cpp"], 600)


# --- llama.cpp itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perplexity_program() -> Path:
    """llama.cpp's own, where MISTILL_LLAMA_CPP names the folder of its programs."""
    folder = os.environ.get("MISTILL_LLAMA_CPP")
    if not folder:
        pytest.skip("MISTILL_LLAMA_CPP names no folder with llama-perplexity")
    return Path(folder) / "llama-perplexity"


def llama_cpp_figure(
    program: Path, file: Path, text: Path, chunks: int = -1
) -> tuple[float, float]:
    """What llama-perplexity says of a GGUF file and a text: perplexity, and its error."""
    command = [str(program), "-m", str(file), "-f", str(text), "-c", "512", "-b", "512", "-t", "1"]
    done = subprocess.run(
        [*command, "--chunks", str(chunks)], capture_output=True, text=True, check=True
    )
    said = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    assert said is not None, done.stderr[-2000:]
    return float(said[1]), float(said[2])


@pytest.mark.parametrize("begins", [False, True])
def test_perplexity_is_llama_cpps_own_on_the_same_weights_and_text(
    begins: bool, perplexity_program: Path, prose: Path, tmp_path: Path
):
    import json

    from export import to_gguf

    folder = tiny_model(tmp_path / "model", seed=5, model_type="llama")
    if begins:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    gguf = to_gguf(folder, tmp_path / "tiny.gguf", dtype="float32")
    theirs, _ = llama_cpp_figure(perplexity_program, gguf, prose)
    vocabulary: Vocabulary = load_vocabulary(folder)
    assert vocabulary.adds_bos is begins
    ours = quoted(folder, prose, "llama.cpp")
    # The goal is 0.5%; weights and arithmetic are float32 on both sides.
    assert ours.value == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("MISTILL_GGUF" not in os.environ, reason="MISTILL_GGUF names no GGUF file")
def test_perplexity_of_a_real_model_is_llama_cpps_own(perplexity_program: Path, tmp_path: Path):
    """MISTILL_GGUF names a file of float weights that mistill opens, MISTILL_TEXT a text file."""
    from mistill import save_model

    gguf, text = Path(os.environ["MISTILL_GGUF"]), Path(os.environ["MISTILL_TEXT"])
    folder = save_model(gguf, tmp_path / "model")
    theirs, _ = llama_cpp_figure(perplexity_program, gguf, text, chunks=4)
    (cut,) = cut_texts(text, load_vocabulary(folder), ["llama.cpp"], 4 * 512)
    assert quote(opened(folder), cut).value == pytest.approx(theirs, rel=5e-3)
