"""Several prompts answered at once by a model in PyTorch.

B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.chat.stream_text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mistill.text.vocabulary import Vocabulary


class Reply(NamedTuple):
    """What a teacher said.

    Attributes:
        ids: Token ids, without the one that ends the turn.
        finished: Whether the teacher ended its turn itself.
    """

    ids: list[int]
    finished: bool


def text_of(reply: Reply, vocabulary: Vocabulary) -> str:
    """What a reply says.

    Args:
        reply: The reply.
        vocabulary: The teacher's vocabulary.

    Returns:
        Its text without the white space around it; of one that was cut off within a character,
        without the beginning of that.
    """
    if reply.finished:
        return vocabulary.decode(reply.ids).strip()
    stream = TextStream(vocabulary)
    return ("".join(map(stream.add, reply.ids)) + stream.finish(cut_off=True)).strip()


def write_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choose: Sequence[Callable[[NDArray[np.float32]], int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    finished: Callable[[], None] = lambda: None,
) -> list[Reply]:
    """Answer several prompts at once, padded on the left.

    A prompt whose reply has ended leaves the batch, so that a long reply does not keep the short
    ones computing.

    Args:
        model: A Llama or Mistral with its head, in eval mode.
        prompts: B prompts, token ids, none empty.
        choose: One function for each prompt, from logits (V,) to a token.
        end_ids: Tokens at which a reply ends.
        max_new_tokens: Most tokens of a reply.
        finished: Called once for each reply that ends.

    Returns:
        B replies.
    """
    replies: list[Reply] = [Reply([], False) for _ in prompts]
    going = list(range(len(prompts)))
    for logits, leave in _steps(model, prompts, max_new_tokens):
        tokens = [choose[row](scores) for row, scores in zip(going, logits, strict=True)]
        stay = []
        for place, (row, token) in enumerate(zip(going, tokens, strict=True)):
            if token in end_ids:
                replies[row] = Reply(replies[row].ids, True)
                continue
            replies[row].ids.append(token)
            if len(replies[row].ids) < max_new_tokens:
                stay.append(place)
        for _ in range(len(going) - len(stay)):
            finished()
        going = [going[place] for place in stay]
        leave(stay, [tokens[place] for place in stay])
    return replies


_Leave = Callable[[Sequence[int], Sequence[int]], None]


def _steps(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator[tuple[NDArray[np.float32], _Leave]]:
    """Yield the logits (B, V) of the rows still going, and how to say which go on with what."""
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)

    def leave(stay: Sequence[int], tokens: Sequence[int]) -> None:
        nonlocal ids, seen
        if len(stay) < len(ids):
            rows = torch.tensor(stay, dtype=torch.long, device=device)
            cache.batch_select_indices(rows)
            seen = seen[rows]
        ids = torch.tensor(tokens, dtype=torch.long, device=device)[:, None]
        seen = torch.cat([seen, torch.ones_like(ids)], dim=1)

    while len(ids):
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Entered anew for each step: across a yield it would leak into the caller.
        with torch.inference_mode():
            scores = model(
                ids,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logits = scores.float().cpu().numpy()
        yield logits, leave
