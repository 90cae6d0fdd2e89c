"""Kernels are chosen by what they take, among those that change no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import export.kernels.probe
from export import probe_cpu, to_onnx
from export.kernels.choosing import allowed, tune
from export.kernels.kernels import KERNELS, MOST_WEIGHTS, PROMPT, OnnxTimer, Timing
from export.kernels.probe import Probe, read_probe, run_probe
from export.weights.architecture import read_architecture
from export.weights.blocks import blocks_of_codes, widen
from export.weights.shapes import StoredFormat, product_shapes
from mistill.cost_model.products import Kernel
from mistill.errors import SettingsError, TargetExistsError
from mistill.folders.folder import read_json
from tests.export.sources import gptq_folder, nf4_folder, quantized_weight
from tests.tiny import tiny_model

INT4 = {block: Kernel("int4", block) for block in (32, 64, 128)}
INT8 = {block: Kernel("int8", block) for block in (32, 64, 128)}


def timer_of(slow: Mapping[Kernel, float]) -> Any:
    """A stopwatch that knows what each kernel takes for a weight; others take 1."""

    def timer(kernels: Sequence[Kernel], rows: int, columns: int) -> Mapping[Kernel, Timing]:
        return {
            kernel: Timing(
                token=slow.get(kernel, 1.0) * rows * columns,
                prompt=100 * slow.get(kernel, 1.0) * rows * columns,
            )
            for kernel in kernels
        }

    return timer


def probe_of(slow: Mapping[Kernel, float], shapes: Any = ((256, 256),)) -> Probe:
    return run_probe(
        shapes, timer_of(slow), machine="a laptop", threads=3, memory_bytes_per_second=2e10
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices have room for blocks of 128; read only."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return tiny_model(folder, hidden_size=128, intermediate_size=256, tie_word_embeddings=True)


# --- what the source allows ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "columns", "expected"),
    [
        (StoredFormat(4, 128, 256, widens=True), 256, [*INT4.values(), *INT8.values()]),
        (StoredFormat(4, 64, 256, widens=True), 256, [INT4[32], INT4[64], INT8[32], INT8[64]]),
        (StoredFormat(4, 128, 32, widens=True), 256, [INT4[32], INT8[32]]),
        (StoredFormat(4, 256, 256, widens=False), 576, [INT4[32], INT4[64]]),
        (StoredFormat(3, 48, 256, widens=True), 96, []),
        (StoredFormat(8, 64, 256, widens=False), 256, [INT8[32], INT8[64]]),
    ],
    ids=str,
)
def test_only_kernels_that_change_no_weight_are_allowed(
    stored: StoredFormat, columns: int, expected: list[Kernel]
) -> None:
    assert allowed(stored, columns) == expected


def test_codes_in_8_bits_stand_for_the_same_weight() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    for bits in (2, 3, 4):
        for symmetric in (True, False):
            narrow = quantized_weight(weight, bits=bits, group_size=32, symmetric=symmetric)
            broad = widen(narrow)
            assert broad.bits == 8
            assert broad.symmetric == narrow.symmetric
            np.testing.assert_array_equal(broad.dequantize(), narrow.dequantize())
            np.testing.assert_array_equal(
                blocks_of_codes(broad, 32).dequantize(), narrow.dequantize()
            )


# --- the choice ---------------------------------------------------------------------------------


def choose(wide: Path, slow: Mapping[Kernel, float], stored: StoredFormat) -> Kernel:
    architecture = read_architecture(read_json(wide / "config.json"))
    return tune(probe_of(slow), architecture, {"down": [stored]}).choices["down", stored.bits]


def test_the_fastest_is_chosen_whichever_it_is(wide: Path) -> None:
    form = StoredFormat(4, 128, 256, widens=True)
    for kernel in (*INT4.values(), *INT8.values()):
        assert choose(wide, {kernel: 0.5}, form) == kernel


def test_what_the_source_does_not_allow_is_never_chosen(wide: Path) -> None:
    fast = {INT4[128]: 0.1, Kernel("dynamic_int8"): 0.1, Kernel("float32"): 0.1, INT8[64]: 0.2}
    assert choose(wide, {**fast, INT4[64]: 0.5}, StoredFormat(4, 64, 256, widens=False)) == INT4[64]


def test_of_kernels_as_fast_the_smallest_and_finest_is_chosen(wide: Path) -> None:
    form = StoredFormat(4, 128, 256, widens=True)
    assert choose(wide, {INT8[128]: 0.95, INT4[128]: 0.92}, form) == INT4[32]
    assert choose(wide, {INT8[128]: 0.85, INT4[128]: 0.87}, form) == INT4[128]


@pytest.mark.parametrize(
    ("kind", "prompt", "bits", "expected"),
    [
        # 0.1 + 128 * 0.002 against 0.15 + 128 * 0.001, and against 0.5 + 128 * 0.001
        ("down", 0.15, 4, INT4[64]),
        ("down", 0.5, 4, INT4[32]),
        # The head multiplies one position of a prompt.
        ("head", 9.0, 4, INT4[64]),
    ],
)
def test_an_answer_counts_beside_its_prompt(
    kind: Any, prompt: float, bits: int, expected: Kernel, wide: Path
) -> None:
    architecture = read_architecture(read_json(wide / "config.json"))
    rows, columns, count = product_shapes(architecture)[kind]
    times = {
        INT4[32]: Timing(token=2e-3, prompt=0.1),
        INT4[64]: Timing(token=1e-3, prompt=prompt),
    }
    found = replace(probe_of({}), timings={(k, rows, columns): t for k, t in times.items()})
    tuning = tune(found, architecture, {kind: [StoredFormat(bits, 64, 256, widens=False)]})
    assert tuning.choices == {(kind, bits): expected}
    step = 1e3 * count * times[expected].token
    assert tuning.to_dict()["products_ms_per_token"] == pytest.approx(step)


def test_groups_of_several_sizes_are_all_cut(wide: Path) -> None:
    architecture = read_architecture(read_json(wide / "config.json"))
    forms = [StoredFormat(4, 128, 256, widens=False), StoredFormat(4, 32, 256, widens=False)]
    tuning = tune(probe_of({INT4[128]: 0.1}), architecture, {"down": forms})
    assert tuning.choices == {("down", 4): INT4[32]}


def test_the_shapes_are_those_of_the_graph(wide: Path) -> None:
    architecture = read_architecture(read_json(wide / "config.json"))
    assert product_shapes(architecture) == {
        "qkv": (128 + 2 * 64, 128, 2),
        "o": (128, 128, 2),
        "gate_up": (512, 128, 2),
        "down": (128, 256, 2),
        "head": (384, 128, 1),
    }


# --- probes -------------------------------------------------------------------------------------


def test_a_shape_that_was_not_timed_is_scaled_from_the_nearest() -> None:
    found = probe_of({}, [(100, 64), (1000, 64), (100, 512), (10, 96)])
    # Of 96 columns not all kernels can be timed, so that it does not count though it is nearest.
    assert found.timing(INT4[32], 20, 96) == Timing(token=20 * 96.0, prompt=100 * 20 * 96.0)
    changed = {
        key: Timing(token=7.0, prompt=70.0) for key in found.timings if key[1:] == (100, 512)
    }
    skewed = replace(found, timings={**found.timings, **changed})
    near = skewed.timing(INT4[128], 100, 400)
    assert near is not None
    assert near.token == pytest.approx(7 * 400 / 512)
    assert near.prompt == pytest.approx(70 * 400 / 512)


def test_a_probe_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = probe_of({INT4[64]: 0.3})
    assert read_probe(found.save(tmp_path / "probe.json")) == found


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", '{"mistill_probe": 1}'])
def test_a_file_that_is_no_probe_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(SettingsError, match="is not a probe"):
        read_probe(tmp_path / "probe.json")


def clock_of(durations: Iterator[float]) -> Any:
    """A clock on which each run takes the next of some durations."""
    now, running = 0.0, False

    def clock() -> float:
        nonlocal now, running
        if running:
            now += next(durations)
        running = not running
        return now

    return clock


def test_the_least_of_many_rounds_counts_for_each_kernel() -> None:
    def durations() -> Iterator[float]:
        for number in range(15):  # rounds of one token, in which two kernels take turns
            yield 0.5 if number == 4 else 3.0
            yield 0.25 if number == 14 else 3.0
        for number in range(2):
            yield (9.0, 8.0)[number]
            yield (6.0, 7.0)[number]

    kernels = [INT4[32], Kernel("float32")]
    found = OnnxTimer(1, clock_of(durations()))(kernels, 1024, 1024)
    assert found == {
        INT4[32]: Timing(token=0.5, prompt=8.0),
        Kernel("float32"): Timing(token=0.25, prompt=6.0),
    }


def test_large_matrices_are_timed_by_a_part_and_small_ones_by_several() -> None:
    def two() -> Iterator[float]:
        while True:
            yield 2.0

    timer = OnnxTimer(1, clock_of(two()))
    large = timer([INT4[32]], 4 * MOST_WEIGHTS // 64, 64)[INT4[32]]
    assert large.token == pytest.approx(4 * 2.0)
    small = timer([INT4[32]], 128, 64)[INT4[32]]
    assert small.token == pytest.approx(2.0 / (MOST_WEIGHTS // (128 * 64)))


def test_every_kernel_runs_and_a_prompt_takes_longer() -> None:
    found = OnnxTimer(1)(KERNELS, 256, 128)
    assert list(found) == list(KERNELS)
    assert all(0 < timing.token < timing.prompt for timing in found.values())
    assert PROMPT == 512


def test_a_probe_of_this_machine_is_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.kernels.kernels.OnnxTimer", lambda threads: timer_of({}))
    file = probe_cpu(tmp_path / "probe.json", model=model, threads=2)
    found = read_probe(file)
    assert (found.threads, found.machine != "") == (2, True)
    assert {key[1:] for key in found.timings} == {
        (128, 64),
        (64, 64),
        (256, 64),
        (64, 128),
        (384, 64),
    }
    with pytest.raises(TargetExistsError):
        probe_cpu(file)
    with pytest.raises(SettingsError, match="threads"):
        probe_cpu(tmp_path / "other.json", threads=0)


# --- the export ---------------------------------------------------------------------------------


def products(folder: Path) -> dict[str, tuple[int, int]]:
    """Bits and block size of every product of codes."""
    return {
        str(node.name).removeprefix("layers."): (
            node.attributes.get_int("bits", 0),
            node.attributes.get_int("block_size", 0),
        )
        for node in ir.load(folder / "model.onnx").graph
        if node.op_type == "MatMulNBits"
    }


SOURCES: dict[str, tuple[dict[str, Any], Kernel, tuple[int, int]]] = {
    "4 bits": ({"group_size": 128}, INT4[128], (4, 128)),
    "asymmetric": ({"group_size": 64, "symmetric": False}, INT4[64], (4, 64)),
    "widened": ({"group_size": 64}, INT8[64], (8, 64)),
    "widened, asymmetric": ({"group_size": 32, "symmetric": False}, INT8[32], (8, 32)),
    "widened, act-order": ({"group_size": 32, "act_order": True}, INT8[32], (8, 32)),
    "rows": ({"group_size": -1}, INT4[128], (4, 128)),
    "3 bits": ({"bits": 3, "group_size": 64}, INT4[64], (4, 64)),
    "3 bits widened": ({"bits": 3, "group_size": 64}, INT8[64], (8, 64)),
    "8 bits": ({"bits": 8, "group_size": 128}, INT8[64], (8, 64)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_graph_has_the_kernel_that_was_chosen_and_the_same_weights(
    name: str, wide: Path, tmp_path: Path
) -> None:
    options, fast, expected = SOURCES[name]
    source, weights = gptq_folder(wide, tmp_path / "gptq", **options)
    target = str(probe_of({fast: 0.1}).save(tmp_path / "probe.json"))
    exported = to_onnx(source, tmp_path / "onnx", tune_for=target)
    found = products(exported)
    assert {found[part] for part in ("0.qkv", "1.o", "0.gate_up", "1.down")} == {expected}
    manifest = json.loads((exported / "manifest.json").read_text())
    # Every code, scale and zero was compared with the source's.
    assert manifest["codes"]["matrices"] == len(weights)
    assert manifest["parity"]["mean_kl"] < 0.01
    assert manifest["tuning"]["machine"] == "a laptop"
    assert manifest["memory_bytes_per_second"] == 2e10


def test_a_head_and_rounded_layers_are_tuned_too(wide: Path, tmp_path: Path) -> None:
    target = str(probe_of({INT4[128]: 0.1, INT8[64]: 0.1}).save(tmp_path / "probe.json"))
    exported = to_onnx(wide, tmp_path / "onnx", precision="int4", tune_for=target)
    found = products(exported)
    assert found.pop("logits") == (8, 64)
    assert set(found.values()) == {(4, 128)}


def test_block_size_is_an_upper_bound_for_the_choice(wide: Path, tmp_path: Path) -> None:
    target = str(probe_of({INT4[128]: 0.1, INT4[64]: 0.5}).save(tmp_path / "probe.json"))
    exported = to_onnx(
        wide, tmp_path / "onnx", precision="int4", block_size=64, head_bits=32, tune_for=target
    )
    assert set(products(exported).values()) == {(4, 64)}


def test_nf4_stays_on_its_grid_of_8_bits(wide: Path, tmp_path: Path) -> None:
    target = str(probe_of({INT4[32]: 0.1, INT8[128]: 0.1, INT8[64]: 0.5}).save(tmp_path / "p.json"))
    exported = to_onnx(nf4_folder(wide, tmp_path / "nf4"), tmp_path / "onnx", tune_for=target)
    found = products(exported)
    assert found.pop("logits") == (8, 128)
    assert set(found.values()) == {(8, 64)}


def test_here_times_this_machine(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(shapes: Any) -> Probe:
        assert (512, 128) in list(shapes)
        return probe_of({INT4[64]: 0.1})

    monkeypatch.setattr("export.kernels.choosing.probe_here", here)
    exported = to_onnx(wide, tmp_path / "onnx", precision="int4", tune_for="here")
    assert products(exported)["0.o"] == (4, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "float32"}, "a float32 graph has none"),
        ({"precision": "int4", "accuracy_level": 0}, "leave accuracy_level at 4"),
    ],
    ids=str,
)
def test_a_target_that_would_change_nothing_is_refused(
    options: dict[str, Any], words: str, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=words):
        to_onnx(wide, tmp_path / "onnx", tune_for="here", **options)
    with pytest.raises(SettingsError, match="give here, or a file"):
        to_onnx(wide, tmp_path / "onnx", precision="int4", tune_for="laptop")
    assert not (tmp_path / "onnx").exists()


def test_a_busy_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("export.kernels.kernels.OnnxTimer", lambda threads: timer_of({}))
    for busy, warned in ((0.0, False), (100.0, True)):
        monkeypatch.setattr("psutil.cpu_percent", lambda seconds, busy=busy: busy)
        caplog.clear()
        export.kernels.probe.probe_here([(64, 64)], threads=1)
        assert ("other programs keep" in caplog.text) == warned
