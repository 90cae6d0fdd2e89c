"""Products of float32 matrices stay those of float32, whoever multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from mistill.pytorch import products
from mistill.pytorch.products import fast_products, one_dnn_is_better

precision = torch.get_float32_matmul_precision


@pytest.fixture(autouse=True)
def as_torch_comes() -> Iterator[None]:
    one_dnn_is_better.cache_clear()
    assert precision() == "highest"
    yield
    torch.set_float32_matmul_precision("highest")
    one_dnn_is_better.cache_clear()


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    monkeypatch.setattr(products, "_error_of_a_product", lambda: 1e-6)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 576, 64), (512, 576, 1536), (7, 33, 5)])
def test_products_are_as_exact_as_before(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(columns, inner, generator=generator)
    exact = a.double() @ b.double().t()
    with fast_products():  # on this processor, whatever it is
        error = (torch.nn.functional.linear(a, b).double() - exact).norm() / exact.norm()
    assert error < 1e-6


def test_the_setting_is_one_of_the_process_and_lasts_as_long_as_the_last_body(amd: None) -> None:
    entered, leave = Event(), Event()

    def other() -> None:
        with fast_products():
            entered.set()
            leave.wait(10)

    thread = Thread(target=other)
    with fast_products(), fast_products():
        thread.start()
        assert entered.wait(10)
        assert precision() == "medium"
    assert precision() == "medium"
    leave.set()
    thread.join()
    assert precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_products():
        raise ZeroDivisionError
    assert precision() == "highest"


def test_a_precision_that_somebody_chose_stays(amd: None) -> None:
    torch.set_float32_matmul_precision("high")
    with fast_products(), fast_products():
        assert precision() == "high"
    assert precision() == "high"


def test_a_precision_that_somebody_chose_for_a_backend_stays(amd: None) -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    matmul.fp32_precision = "bf16"
    try:
        with fast_products():
            assert matmul.fp32_precision == "bf16"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = "none"


def test_a_processor_that_rounds_the_factors_keeps_mkl(
    amd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_error_of_a_product", lambda: 2e-3)
    with fast_products():
        assert precision() == "highest"


def test_the_error_of_factors_in_bfloat16_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.mm
    assert products._error_of_a_product() < products._ROUNDING / 3
    monkeypatch.setattr(torch, "mm", lambda a, b: plain(a.bfloat16(), b.bfloat16()).float())
    assert products._error_of_a_product() > 30 * products._ROUNDING


def test_processors_of_other_makers_keep_mkl(
    amd: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(products, "_is_amd", lambda: False)
    with fast_products():
        assert precision() == "highest"
    monkeypatch.undo()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    assert not products._is_amd(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n")
    assert products._is_amd(cpuinfo)


def test_threads_that_begin_together_leave_the_setting_as_it_was(
    amd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = Event()

    def slow_look() -> float:
        looking.set()
        Event().wait(0.05)
        return 1e-6

    monkeypatch.setattr(products, "_error_of_a_product", slow_look)

    def work() -> None:
        with fast_products():
            pass

    threads = [Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert looking.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert precision() == "highest"
