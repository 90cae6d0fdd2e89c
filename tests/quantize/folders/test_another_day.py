"""A template that writes the date lets quantization resume on another day."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quantize
from mistill.folders import publishing
from quantize.folders import gptq_folder
from tests.tiny import CHATML

DATED = "Today: {{ strftime_now('%d %B %Y') }}\n" + CHATML
GPTQ: dict[str, Any] = {"samples": 2, "block_length": 32, "group_size": 32}


@pytest.mark.parametrize("step", ["gptq", "mixed"])
def test_quantization_resumes_on_the_next_day(
    step: str, model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "chat_template.jinja").write_text(DATED)

    def set_day(day: int) -> None:
        class Day:
            fromisoformat = dt.date.fromisoformat

            @staticmethod
            def today() -> dt.date:
                return dt.date(2026, 1, day)

        monkeypatch.setattr(publishing, "date", Day)

    def make(target: str) -> Path:
        if step == "gptq":
            return quantize.to_gptq(source, tmp_path / target, texts=chats, **GPTQ)
        return quantize.to_mixed(
            source, tmp_path / target, texts=chats, samples=2, block_length=32, bits_per_weight=9
        )

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    set_day(1)
    whole = make("whole")
    with monkeypatch.context() as patch:
        patch.setattr(gptq_folder, "_assemble", failing)
        with pytest.raises(KeyboardInterrupt):
            make("out")
    set_day(2)
    assert json.loads((tmp_path / ".out.working" / "key.json").read_text())["date"] == "2026-01-01"
    files = [folder / "model.safetensors" for folder in (whole, make("out"))]
    assert files[0].read_bytes() == files[1].read_bytes()
