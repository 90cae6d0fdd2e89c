"""A teacher in an ONNX folder, which writes many replies at once and needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mistill.engine.language_model import Choose
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.scheduler import MOST_SLOTS, write_all

Answer = Callable[
    [Sequence[Sequence[int]], Sequence[Choose], Callable[[], None]], list[tuple[list[int], bool]]
]


def onnx_writer(folder: Path, end_ids: Collection[int], max_new_tokens: int) -> Answer:
    """Open a teacher.

    Args:
        folder: An ONNX folder.
        end_ids: Tokens at which a reply ends.
        max_new_tokens: Most tokens of a reply.

    Returns:
        A function that takes prompts, what picks the tokens of each reply, and what is called when
        a reply has ended. It returns the tokens of each reply without the one that ends it, and
        whether there was one.
    """
    model = OnnxModel(folder)

    def answer(
        prompts: Sequence[Sequence[int]], choose: Sequence[Choose], finished: Callable[[], None]
    ) -> list[tuple[list[int], bool]]:
        written = write_all(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            choose=choose,
            end_ids=end_ids,
            slots=min(len(prompts), MOST_SLOTS),
            finished=finished,
        )
        return [
            (tokens[:-1], True) if tokens and tokens[-1] in end_ids else (tokens, False)
            for tokens in written
        ]

    return answer
