"""The engine against PyTorch, and against itself without its short cuts."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import export
from mistill.cost_model.processors import usable_threads
from mistill.engine import key_value_cache, onnx_session
from mistill.engine import onnx_model as engine
from mistill.engine.key_value_cache import common_prefix
from mistill.engine.language_model import LanguageModel
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.opening import open_model
from mistill.errors import ContextError, FolderError, MissingExtraError, SettingsError
from tests.tiny import tiny_model

# Two ways of computing one float32 logit of this model differ by 1e-5; of another, by 1e-1.
SAME = 1e-4


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-layer model as a float32 ONNX folder; read only."""
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


@pytest.fixture(scope="module")
def torch_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model).eval()


def some_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 300, count).tolist()
    return ids


def of_torch(torch_model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = torch_model(torch.from_numpy(ids)).logits.numpy()
    return logits


def next_logits(model: OnnxModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """The logits that ``stream`` chooses its first token from."""
    seen = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits.copy())
        return int(logits.argmax())

    next(model.stream(ids, choose))
    return seen[0]


def poison(model: OnnxModel) -> None:
    """Ruin every position of the cache that does not count."""
    used = len(model._cache.ids)
    for array in model._cache._arrays.values():
        array[:, :, used:] = 1e30


def test_logits_are_those_of_pytorch_at_every_position(chatbot: Path, torch_model: Any) -> None:
    ids = np.array([some_ids(90, seed) for seed in range(3)])
    ours = OnnxModel(chatbot, threads=1).logits(ids)
    theirs = of_torch(torch_model, ids)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=SAME)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "mistral", "head_dim": 32},
    ],
    ids=["tied llama", "sliding window", "explicit head_dim"],
)
def test_other_decoders_give_the_logits_of_pytorch_too(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "model", seed=5, **options)
    monkeypatch.setattr(engine, "CHUNK", 13)
    ours = OnnxModel(export.to_onnx(folder, tmp_path / "onnx", parity_positions=0), threads=1)
    ids = some_ids(60)
    their_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = of_torch(their_model, np.array([ids]))
    np.testing.assert_allclose(ours.logits(np.array([ids])), theirs, atol=SAME)
    np.testing.assert_allclose(next_logits(ours, ids[:40]), theirs[0, 39], atol=SAME)


def test_two_hundred_greedy_tokens_are_those_of_transformers_generate(
    chatbot: Path, torch_model: Any
) -> None:
    prompt = some_ids(30)
    ours = list(islice(OnnxModel(chatbot, threads=1).stream(prompt), 200))
    theirs = torch_model.generate(
        torch.tensor([prompt]), max_new_tokens=200, min_new_tokens=200, do_sample=False
    )
    # ``min_new_tokens`` bars the end tokens from transformers' choice, so bar them from ours.
    assert not {2, 4} & set(ours), "choose another prompt: this one reaches an end token"
    assert ours == theirs[0, 30:].tolist()
    assert len(set(ours)) > 20


def test_a_prompt_in_chunks_is_the_whole_prompt(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(75)
    whole = OnnxModel(chatbot, threads=1)
    assert len(ids) <= engine.CHUNK
    expected, last = whole.logits(np.array([ids])), next_logits(whole, ids)
    np.testing.assert_allclose(last, expected[0, -1], atol=SAME)
    for size in (1, 7, 74, 75):
        monkeypatch.setattr(engine, "CHUNK", size)
        chunked = OnnxModel(chatbot, threads=1)
        np.testing.assert_allclose(chunked.logits(np.array([ids])), expected, atol=SAME)
        chunked._cache.rewind(0)
        np.testing.assert_allclose(next_logits(chunked, ids), last, atol=SAME)


def test_what_a_text_predicts_does_not_depend_on_what_follows(chatbot: Path) -> None:
    """To the last bit, so that answers of one token are scored as those of two are."""
    model = OnnxModel(chatbot, threads=1)
    ids = some_ids(engine.CHUNK + 2)
    whole = model.logits(np.array([ids]))
    for length in (1, 2, engine.CHUNK, engine.CHUNK + 1):
        np.testing.assert_array_equal(model.logits(np.array([ids[:length]])), whole[:, :length])


def test_growing_the_cache_changes_nothing(chatbot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = some_ids(9)
    large = OnnxModel(chatbot, threads=1)
    expected = list(islice(large.stream(prompt), 300))
    before = large._cache.size_bytes
    monkeypatch.setattr(key_value_cache, "FIRST_CAPACITY", 5)
    small = OnnxModel(chatbot, threads=1, context=311)
    assert small._cache.size_bytes == 0
    sizes = set()
    tokens = []
    for token in islice(small.stream(prompt), 300):
        tokens.append(token)
        sizes.add(small._cache.size_bytes)
        poison(small)
    assert tokens == expected
    # 2 layers, keys and values, 2 heads of 16 floats; 5 doubled until 309 fit, at most 311.
    per_position = 2 * 2 * 2 * 16 * 4
    assert sizes == {per_position * capacity for capacity in (10, 20, 40, 80, 160, 311)}
    assert before == per_position * 512


def test_a_growing_cache_never_is_in_memory_twice(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(chatbot, threads=1)
    monkeypatch.setattr(key_value_cache, "FIRST_CAPACITY", 64)
    next_logits(model, some_ids(40))
    old = [weakref.ref(array.base) for array in model._cache._arrays.values()]
    alive = []

    def as_value(array: Any, device: Any) -> Any:
        alive.append(sum(reference() is not None for reference in old))
        return made(array, device)

    made = key_value_cache.as_value
    monkeypatch.setattr(key_value_cache, "as_value", as_value)
    model._cache.reserve(400)
    # A buffer goes when its copy is made, and takes its memory along.
    assert alive == [4, 3, 2, 1]
    assert not any(reference() for reference in old)
    assert model._cache.ids == some_ids(40)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel does not tell")
def test_memory_of_a_cache_is_taken_when_written_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE

    # Once so much was let go, the C library takes what is smaller from a heap, and keeps it.
    del [np.ones(24 << 20, np.uint8)][:]
    size, count = 2 << 20, 32
    before = resident()
    arrays = [key_value_cache.pages((1, 2, size // 16, 2), np.float32) for _ in range(count)]
    assert resident() - before < size * count / 4
    for array in arrays:
        assert array.shape == (1, 2, size // 16, 2)
        array[:, :1] = 1
    above = np.ones(1 << 20, np.uint8)
    assert size * count / 4 < resident() - before < size * count * 3 / 4
    del arrays, array
    assert resident() - before < size * count / 4
    assert above.all()


def test_room_for_a_prompt_is_made_once(chatbot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK", 8)
    monkeypatch.setattr(key_value_cache, "FIRST_CAPACITY", 8)
    model = OnnxModel(chatbot, threads=1)
    sizes = set()
    read = model._read

    def watched(*given: Any) -> None:
        sizes.add(model._cache.size_bytes)
        read(*given)

    monkeypatch.setattr(model, "_read", watched)
    next(model.stream(some_ids(100)))
    assert len(sizes) == 1


def test_the_cache_starts_small_however_long_the_context_is(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", max_position_embeddings=8192)
    made = export.to_onnx(folder, tmp_path / "onnx", parity_positions=0, context_length=8192)
    model = OnnxModel(made, threads=1)
    next(model.stream([5]))
    assert model.context_length == 8192
    assert model._cache.size_bytes == 2 * 2 * 2 * 16 * 4 * 512


def test_what_was_taken_back_leaves_no_trace(chatbot: Path) -> None:
    """Reading on after a rewind is bit for bit reading on without what was taken back."""
    start, wrong, right = some_ids(40), some_ids(25, 1), some_ids(25, 2)
    plain = OnnxModel(chatbot, threads=1)
    next(plain.stream(start))
    expected = next_logits(plain, start + right)
    rewound = OnnxModel(chatbot, threads=1)
    next(rewound.stream(start))
    next_logits(rewound, start + wrong)
    read = count_positions(rewound)
    np.testing.assert_array_equal(next_logits(rewound, start + right), expected)
    assert read == [25]


def count_positions(model: OnnxModel) -> list[int]:
    """Note how many positions each run of the graph reads from now on."""
    read: list[int] = []
    run = model._read

    def noted(tokens: list[int], scores: NDArray[np.float32]) -> None:
        read.append(len(tokens))
        run(tokens, scores)

    model._read = noted  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("shared", [0, 1, 30, 59, 60])
def test_a_prompt_that_begins_like_the_last_text_gives_the_logits_of_a_cold_start(
    chatbot: Path, shared: int
) -> None:
    first, other = some_ids(60, 3), some_ids(40, 4)
    second = first[:shared] + other
    cold = next_logits(OnnxModel(chatbot, threads=1), second)
    warm = OnnxModel(chatbot, threads=1)
    next(warm.stream(first))
    poison(warm)
    read = count_positions(warm)
    np.testing.assert_allclose(next_logits(warm, second), cold, atol=SAME)
    assert read == [40]


def test_a_prompt_that_was_read_already_reads_its_last_token_again(chatbot: Path) -> None:
    prompt = some_ids(60)
    model = OnnxModel(chatbot, threads=1)
    expected = list(islice(model.stream(prompt), 20))
    read = count_positions(model)
    assert list(islice(model.stream(prompt), 20)) == expected
    assert read == [1] * 20
    assert list(islice(model.stream(prompt[:30]), 3)) == list(
        islice(OnnxModel(chatbot, threads=1).stream(prompt[:30]), 3)
    )


@pytest.mark.parametrize("positions", [1, 2, 5, 20])
@pytest.mark.parametrize("shared", [0, 45, 60])
def test_the_last_positions_of_a_text_are_read_with_what_is_cached(
    chatbot: Path, positions: int, shared: int
) -> None:
    ids = some_ids(60, 1)
    model = OnnxModel(chatbot, threads=1)
    expected = model.logits(np.array([ids]))[0, -positions:]
    model.read(ids[:shared] + some_ids(9, 2))
    poison(model)
    scores = model.read(ids, positions)
    assert scores.shape == (positions, model.vocabulary_size)
    np.testing.assert_allclose(scores, expected, atol=SAME)
    kept = scores.copy()
    model.read(some_ids(30, 3), 2)
    np.testing.assert_array_equal(scores, kept)
    # The cache goes on from there.
    np.testing.assert_allclose(next_logits(model, ids), expected[-1], atol=SAME)


def test_positions_that_a_text_does_not_have_are_refused(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    for positions in (0, 6):
        with pytest.raises(ValueError, match="between 1 and 5"):
            model.read(some_ids(5), positions)


def test_a_stream_can_be_left_at_any_token(chatbot: Path) -> None:
    """What was written until then, and no more, is what the next text finds in the cache."""
    prompt = some_ids(20)
    expected = list(islice(OnnxModel(chatbot, threads=1).stream(prompt), 12))
    for count in range(1, 12):
        model = OnnxModel(chatbot, threads=1)
        read = count_positions(model)
        stream = model.stream(prompt)
        assert list(islice(stream, count)) == expected[:count]
        stream.close()  # type: ignore[attr-defined]
        assert read == [20] + [1] * (count - 1)
        assert model._cache.ids == prompt + expected[: count - 1]
        assert list(islice(model.stream(prompt), 12)) == expected


# --- what was read, on disk -----------------------------------------------------------------------


def test_a_saved_cache_is_read_on_from_as_if_it_had_not_been_away(
    chatbot: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    first, more = some_ids(90), some_ids(20, 1)
    model = OnnxModel(chatbot, threads=1)
    model.read(first)
    file = model.save_cache(tmp_path / "kept.safetensors", about="weather")
    expected = list(islice(model.stream(first + more), 30))
    cold = OnnxModel(chatbot, threads=1)
    assert cold.restore_cache(file) == {"about": "weather"}
    read = count_positions(cold)
    assert list(islice(cold.stream(first + more), 30)) == expected
    assert read == [20] + [1] * 29
    tensors = load_file(file)
    assert tensors["ids"].tolist() == first
    np.testing.assert_array_equal(tensors["1.value"], model._cache.used()["1.value"][:, :, :90])
    # It is taken up over whatever was there before, and the file can be written again.
    cold.restore_cache(cold.save_cache(file))
    assert cold._cache.ids == first + more + expected[:-1]
    assert list(tmp_path.iterdir()) == [file]


def test_an_empty_cache_can_be_saved_too(chatbot: Path, tmp_path: Path) -> None:
    file = OnnxModel(chatbot, threads=1).save_cache(tmp_path / "kept")
    model = OnnxModel(chatbot, threads=1)
    expected = next_logits(model, [5, 6])
    assert model.restore_cache(file) == {}
    assert model._cache.ids == []
    np.testing.assert_array_equal(next_logits(model, [5, 6]), expected)


def test_a_cache_of_another_model_is_refused_by_name(
    chatbot: Path, tmp_path: Path, teacher: Path
) -> None:
    other = export.to_onnx(teacher, tmp_path / "other-chatbot", parity_positions=0)
    theirs = OnnxModel(other, threads=1)
    theirs.read([5, 6, 7])
    file = theirs.save_cache(tmp_path / "kept")
    model = OnnxModel(chatbot, threads=1)
    with pytest.raises(
        FolderError, match=r"by the model other-chatbot \(\w{12}\), not by chatbot \(\w{12}\)"
    ):
        model.restore_cache(file)
    with pytest.raises(ContextError, match="holds 3 tokens and the context only 2"):
        OnnxModel(other, threads=1, context=2).restore_cache(file)


def test_a_file_that_is_no_cache_is_refused(chatbot: Path, tmp_path: Path, model: Path) -> None:
    ours = OnnxModel(chatbot, threads=1)
    ours.read(some_ids(9))
    with pytest.raises(FolderError, match="no such file"):
        ours.restore_cache(tmp_path / "nothing")
    with pytest.raises(FolderError, match="does not hold a KV cache"):
        ours.restore_cache(model / "model.safetensors")
    file = ours.save_cache(tmp_path / "kept")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FolderError, match="cut short"):
        ours.restore_cache(file)
    with pytest.raises(FolderError, match="there is no folder"):
        ours.save_cache(tmp_path / "nowhere" / "kept")
    assert ours._cache.ids == some_ids(9)


# --- providers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "named"),
    [
        ("cuda", "install onnxruntime-gpu instead of onnxruntime"),
        ("tensorrt", "install onnxruntime-gpu .* TensorRT"),
        ("coreml", "only onnxruntime for macOS has it"),
        ("directml", "on Windows, install onnxruntime-directml"),
    ],
)
def test_a_provider_that_is_not_there_is_refused_in_one_line(
    chatbot: Path, provider: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        MissingExtraError, match=rf"has no \w+ExecutionProvider here, only CPU\w+; {named}"
    ) as no:
        OnnxModel(chatbot, provider=provider)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("provider", ["coreml", "directml"])
def test_a_provider_with_buffers_of_its_own_is_given_those_of_the_processor(
    chatbot: Path, provider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(onnx_session._PROVIDERS, provider, ["CPUExecutionProvider"])
    ids = some_ids(20, 5)
    expected = list(islice(OnnxModel(chatbot, threads=1).stream(ids), 10))
    assert list(islice(OnnxModel(chatbot, threads=1, provider=provider).stream(ids), 10)) == (
        expected
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_provider_that_does_not_start_is_not_replaced_silently(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it would start")
    monkeypatch.setattr(engine, "check_provider", lambda provider: None)
    with pytest.raises(MissingExtraError, match="CUDAExecutionProvider does not start"):
        OnnxModel(chatbot, provider="cuda")


def test_two_streams_may_take_turns_on_one_model(chatbot: Path) -> None:
    prompts = [some_ids(20, 5), some_ids(31, 6)]
    alone = [list(islice(OnnxModel(chatbot, threads=1).stream(p), 40)) for p in prompts]
    model = OnnxModel(chatbot, threads=1)
    streams = [model.stream(prompt) for prompt in prompts]
    together: list[list[int]] = [[], []]
    for turn in range(40):
        for which in (0, 1) if turn % 3 else (1, 0):
            together[which].append(next(streams[which]))
        if turn % 7 == 0:
            model.logits(np.array([some_ids(5, turn)]))
    assert together == alone


def all_logits(model: OnnxModel, ids: list[int], repeatable: bool) -> NDArray[np.float32]:
    """The logits of eight steps."""
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits.copy())
        return int(logits.argmax())

    for _ in islice(model.stream(ids, choose, repeatable=repeatable), 8):
        pass
    return np.stack(seen)


def repeats(model: OnnxModel, prompt: list[int], expected: Any, *, repeatable: bool) -> bool:
    """Whether a prompt gives the same bits after itself, after other texts and between them."""
    same = []
    for other in (None, prompt[:1], prompt[:13], prompt + some_ids(3), some_ids(9, 8)):
        if other is not None:
            next(model.stream(other))
        same.append(np.array_equal(all_logits(model, prompt, repeatable), expected))
    # What the model wrote is a prompt now; a stream that is open still must not disturb it.
    written = prompt + [int(logits.argmax()) for logits in expected]
    open_still = model.stream(written[:-3])
    next(open_still)
    cold = all_logits(OnnxModel(model.folder, threads=1), written, repeatable)
    same.append(np.array_equal(all_logits(model, written, repeatable), cold))
    next(open_still)
    return all(same)


@pytest.mark.parametrize("length", [1, 2, 30, 31, 131])
def test_a_repeatable_stream_depends_on_its_prompt_alone_to_the_last_bit(
    chatbot: Path, length: int
) -> None:
    prompt = some_ids(length)
    for repeatable in (True, False):
        model = OnnxModel(chatbot, threads=1)
        expected = all_logits(model, prompt, repeatable)
        assert repeats(model, prompt, expected, repeatable=repeatable) == repeatable


def test_a_text_that_is_being_written_is_not_read_again(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    first, second = model.stream(some_ids(20)), model.stream(some_ids(20)[:8] + some_ids(9, 5))
    read = count_positions(model)
    for stream in (first, second, first, second, first):
        next(stream)
    model.logits(np.array([some_ids(5)]))
    next(first)
    assert read == [20, 9, 1, 1, 1, 6, 1]
    del first, second, stream
    assert not model._kept


def test_threads_may_share_one_model(chatbot: Path) -> None:
    prompts = [some_ids(20, seed) for seed in range(4)]
    model = OnnxModel(chatbot, threads=1)
    alone = [list(islice(OnnxModel(chatbot, threads=1).stream(p), 30)) for p in prompts]
    written: list[list[int]] = [[] for _ in prompts]

    def write(which: int) -> None:
        written[which].extend(islice(model.stream(prompts[which]), 30))

    threads = [threading.Thread(target=write, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == alone


@pytest.mark.parametrize("step", ["memory made", "input bound", "run", "read"])
def test_an_interrupt_between_any_two_steps_leaves_the_model_usable(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 8)
    monkeypatch.setattr(key_value_cache, "FIRST_CAPACITY", 8)
    prompt = some_ids(30)
    expected = list(islice(OnnxModel(chatbot, threads=1).stream(prompt), 10))
    for at in range(9):
        model = OnnxModel(chatbot, threads=1)
        owner, name = {
            "memory made": (key_value_cache, "as_value"),
            "input bound": (model, "_bind"),
            "run": (model.session, "run_with_iobinding"),
            "read": (model, "_read"),
        }[step]
        with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
            interrupted.setattr(owner, name, interrupted_after(getattr(owner, name), at))
            list(islice(model.stream(prompt), 10))
        poison(model)
        assert list(islice(model.stream(prompt), 10)) == expected


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_prompt_does_not_mislead_the_next_single_token(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    prompt = some_ids(30)
    model = OnnxModel(chatbot, threads=1)
    expected = list(islice(model.stream(prompt), 10))
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(model, "_bind", interrupted_after(model._bind, at))
        next(model.stream(prompt + some_ids(9, 1)))
    read = count_positions(model)
    assert list(islice(model.stream(prompt), 10)) == expected
    assert read == [1] * 10


def interrupted_after(call: Any, at: int) -> Any:
    """A function that works, but is interrupted once, right after the call of that number."""
    count = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        result = call(*arguments)
        if count == at + 1:
            raise KeyboardInterrupt
        return result

    return wrapped


def test_the_stream_ends_when_prompt_and_reply_fill_the_context(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1, context=50)
    prompt = some_ids(42)
    written = list(model.stream(prompt))
    assert len(written) == 8
    assert written == list(islice(OnnxModel(chatbot, threads=1).stream(prompt), 8))
    assert list(model.stream(some_ids(50))) == []
    assert model.logits(np.array([some_ids(50)])).shape == (1, 50, model.vocabulary_size)


def test_what_does_not_fit_is_refused_before_anything_is_read(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1, context=50)
    with pytest.raises(ContextError, match="51 tokens and the context holds 50"):
        model.stream(some_ids(51))
    with pytest.raises(ContextError):
        model.logits(np.array([some_ids(51)]))
    with pytest.raises(ValueError, match="empty"):
        model.stream([])
    with pytest.raises(ValueError, match="between 0 and"):
        model.stream([5, model.vocabulary_size])
    with pytest.raises(ValueError, match="between 0 and"):
        model.logits(np.array([[-1, 2]]))
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model.logits(np.array([1, 2]))


def test_scores_are_the_callers_own(chatbot: Path) -> None:
    """Neither written to by later runs nor kept alive by the engine."""
    model = OnnxModel(chatbot, threads=1)
    scores = model.logits(np.array([some_ids(20)]))
    before = scores.copy()
    list(islice(model.stream(some_ids(10, 1)), 5))
    model.logits(np.array([some_ids(20, 2)]))
    np.testing.assert_array_equal(scores, before)
    alive = weakref.ref(scores)
    del scores
    assert alive() is None


def test_the_engine_meets_the_protocol_and_opens_by_form(chatbot: Path) -> None:
    model: LanguageModel = open_model(chatbot, threads=1)
    assert isinstance(model, OnnxModel)
    assert model.threads == 1
    assert model.vocabulary_size == json.loads((chatbot / "config.json").read_text())["vocab_size"]
    assert model.context_length == 512


def test_a_choice_decides_what_is_read_next(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=1)
    said = iter([7, 8, 9])
    assert list(islice(model.stream([5, 6], lambda logits: next(said)), 3)) == [7, 8, 9]
    expected = next_logits(OnnxModel(chatbot, threads=1), [5, 6, 7, 8, 9])
    np.testing.assert_allclose(next_logits(model, [5, 6, 7, 8, 9]), expected, atol=SAME)


# --- folders --------------------------------------------------------------------------------------


def test_another_form_of_folder_is_refused(model: Path) -> None:
    with pytest.raises(FolderError, match="is a float folder, not an ONNX folder"):
        OnnxModel(model)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"context": 0}, {"context": 513}, {"provider": "gpu"}], ids=str
)
def test_arguments_out_of_range_are_refused(chatbot: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        OnnxModel(chatbot, **options)


@pytest.fixture
def broken(chatbot: Path, tmp_path: Path) -> Path:
    """A copy to be broken, whose manifest does not mind."""
    copy = tmp_path / "broken"
    shutil.copytree(chatbot, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("model.onnx", "config.json"):
        del manifest["files"][name]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def edit_graph(folder: Path, change: Any) -> None:
    import onnx_ir

    graph = onnx_ir.load(folder / "model.onnx")
    change(graph.graph)
    onnx_ir.save(graph, folder / "model.onnx")


def test_a_graph_that_lacks_what_is_bound_is_refused_by_name(broken: Path) -> None:
    def rename(graph: Any) -> None:
        named = [*graph.inputs, *graph.outputs]
        for value in named:
            if value.name in ("past_key_values.1.value", "present.0.key"):
                value.name = "other." + value.name
            if value.name == "first_logit":
                graph.inputs.remove(value)

    edit_graph(broken, rename)
    with pytest.raises(FolderError) as refused:
        OnnxModel(broken)
    message = str(refused.value)
    assert "the input past_key_values.1.value is missing" in message
    assert "the input other.past_key_values.1.value is not known" in message
    assert "the optional input first_logit is missing" in message
    assert "the output present.0.key is missing" in message
    assert "\n" not in message


def test_a_graph_with_fewer_layers_than_its_config_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match=r"past_key_values\.2\.key is missing.* and 8 more"):
        OnnxModel(broken)


def test_a_graph_that_cannot_be_read_is_refused_in_one_line(broken: Path) -> None:
    (broken / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(FolderError, match="cannot open") as refused:
        OnnxModel(broken)
    assert "\n" not in str(refused.value)


# --- threads and telemetry ------------------------------------------------------------------------


def test_the_session_has_the_threads_that_were_asked_for(chatbot: Path) -> None:
    model = OnnxModel(chatbot, threads=2)
    assert model.session.get_session_options().intra_op_num_threads == 2
    assert OnnxModel(chatbot).threads == usable_threads()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "9000000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n2:memory:/box\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_threads_are_the_processors_and_the_quota_of_the_process(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_threads(tmp_path) == expected


def test_running_a_model_reports_nothing_and_leaves_nothing_in_the_home(
    chatbot: Path, tmp_path: Path
) -> None:
    """ONNX Runtime would make a database of reports there."""
    code = (
        "import sys, itertools, mistill.engine.onnx_model as engine\n"
        "model = engine.OnnxModel(sys.argv[1], threads=1)\n"
        "print(*itertools.islice(model.stream([5, 6, 7]), 4))\n"
    )
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(chatbot)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.split()) == 4
    assert list(tmp_path.iterdir()) == []


def test_the_common_prefix_ends_where_two_texts_part() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([2], [1, 2]) == 0


def test_this_is_the_runtime_that_the_engine_was_written_for() -> None:
    """In-place caches and optional inputs are behaviour that versions may change."""
    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)


# --- a cache in a file that somebody changed ------------------------------------------------------


def _changed(file: Path, target: Path, edit: Callable[[dict[str, Any], bytearray], None]) -> Path:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    edit(header, body)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    return target


def _flip(header: dict[str, Any], body: bytearray) -> None:
    body[header["0.key"]["data_offsets"][0]] ^= 0x7F


def _fewer_rows(header: dict[str, Any], body: bytearray) -> None:
    for name, entry in header.items():
        if name.endswith((".key", ".value")):
            heads, rows, width = entry["shape"][1:]
            entry["shape"] = [1, heads * rows, 1, width]


TAMPERING: dict[str, Callable[[dict[str, Any], bytearray], Any]] = {
    "keys changed": _flip,
    "one value for all": lambda header, _: header["0.key"].update(shape=[1, 1, 1, 1]),
    "fewer rows": _fewer_rows,
    "another type": lambda header, _: header["0.key"].update(dtype="I8"),
    "tokens as floats": lambda header, _: header["ids"].update(dtype="F64"),
    "a token beyond": lambda header, body: body.__setitem__(
        slice(header["ids"]["data_offsets"][0], header["ids"]["data_offsets"][0] + 8),
        (2**40).to_bytes(8, "little"),
    ),
    "offsets below 0": lambda header, _: header["0.key"].update(data_offsets=[-8, 8]),
    "a key that is gone": lambda header, _: header.pop("0.key"),
    "another rank": lambda header, _: header["0.key"].update(shape=[4, 4]),
    "a huge shape": lambda header, _: header["0.key"].update(shape=[1, 2**40, 3, 4]),
    "an unknown type": lambda header, _: header["0.key"].update(dtype="BF16"),
    "a number for a text": lambda header, _: header["__metadata__"].update(fingerprint=3),
}


# Without a checksum, as in files of earlier versions, nothing tells other keys from the right ones.
@pytest.mark.parametrize(
    ("name", "checksum"),
    [(name, True) for name in TAMPERING]
    + [(name, False) for name in TAMPERING if name != "keys changed"],
)
def test_a_cache_that_was_changed_is_refused_and_changes_nothing(
    chatbot: Path, tmp_path: Path, name: str, checksum: bool
) -> None:
    model = OnnxModel(chatbot, threads=1)
    model.read([5, 9, 7, 12])
    sound = model.save_cache(tmp_path / "sound")

    def edit(header: dict[str, Any], body: bytearray) -> None:
        if not checksum:  # as files of earlier versions are
            del header["__metadata__"]["sha256"]
        TAMPERING[name](header, body)

    changed = _changed(sound, tmp_path / "changed", edit)
    before = changed.read_bytes()
    with pytest.raises(FolderError) as raised:
        model.restore_cache(changed)
    assert "\n" not in str(raised.value)
    assert changed.read_bytes() == before
    assert model.restore_cache(sound) == {}
