"""What a client may ask about the model and the server."""

from __future__ import annotations

import time
from typing import Any

from mistill.serve.completions import token_text
from mistill.serve.generation import Served
from mistill.serve.http.exchange import Exchange
from mistill.serve.refusals import RefusalError, bad_request, unavailable
from mistill.serve.requests import DetokenizeRequest, TokenizeRequest, read_request

_STARTED = int(time.time())


async def models(served: Served, exchange: Exchange) -> None:
    """Answer which models there are: one.

    Args:
        served: The model.
        exchange: The request.
    """
    await exchange.answer_json({"object": "list", "data": [_card(served)]})


async def model(served: Served, exchange: Exchange) -> None:
    """Answer what is known of a model.

    Args:
        served: The model.
        exchange: The request.

    Raises:
        RefusalError: If it is another model.
    """
    if exchange.path.removeprefix("/v1/models/") != served.name:
        raise RefusalError(
            404,
            f"this server has the model {served.name} and no other",
            param="model",
            code="model_not_found",
        )
    await exchange.answer_json(_card(served))


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "mistill",
        "max_model_len": served.context_length,
    }


async def tokenize(served: Served, exchange: Exchange) -> None:
    """Answer which tokens a text or a conversation is.

    Args:
        served: The model.
        exchange: The request.
    """
    content = await exchange.body()
    await exchange.answer_json(await served.workers.run(_tokenized, served, content))


def _tokenized(served: Served, content: bytes) -> dict[str, Any]:
    request, _ = read_request(content, TokenizeRequest, served.limits)
    served.check_model(request.model)
    prompts = served.prompts
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if request.prompt is not None:
        prompts.refuse_long([request.prompt], len(request.prompt.encode()), "prompt")
        ids = prompts.text_ids(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        talk = prompts.conversation(request.messages or [])
        ids = prompts.rendered(talk, reply_begins=request.add_generation_prompt)
    answer = {"count": len(ids), "max_model_len": served.context_length, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [token_text(token, served.vocabulary) for token in ids]
    return answer


async def detokenize(served: Served, exchange: Exchange) -> None:
    """Answer what tokens spell.

    Args:
        served: The model.
        exchange: The request.
    """
    content = await exchange.body()
    await exchange.answer_json(await served.workers.run(_detokenized, served, content))


def _detokenized(served: Served, content: bytes) -> dict[str, Any]:
    request, _ = read_request(content, DetokenizeRequest, served.limits)
    served.check_model(request.model)
    if not all(0 <= token < served.vocabulary.size for token in request.tokens):
        raise bad_request(
            f"tokens should hold ids from 0 to {served.vocabulary.size - 1}", "tokens"
        )
    return {"prompt": served.vocabulary.decode(request.tokens)}


async def tokenizer_info(served: Served, exchange: Exchange) -> None:
    """Answer which special tokens there are, and the chat template.

    Args:
        served: The model.
        exchange: The request.
    """
    vocabulary = served.vocabulary
    await exchange.answer_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **vocabulary.special_tokens,
            "add_bos_token": vocabulary.adds_bos,
            "add_eos_token": vocabulary.adds_eos,
            "vocab_size": vocabulary.size,
            "model_max_length": served.context_length,
            "chat_template": vocabulary.chat_template,
        }
    )


async def health(served: Served, exchange: Exchange) -> None:
    """Answer whether the engine lives.

    Args:
        served: The model.
        exchange: The request.

    Raises:
        RefusalError: If it does not, or takes no more requests.
    """
    engine = served.scheduler.health()
    if engine.state != "running":
        raise unavailable(f"the engine is {engine.state}")
    if engine.heartbeat_seconds > served.limits.heartbeat_seconds:
        raise unavailable("the engine gives no sign of life")
    await exchange.answer_json({"status": "ok"})


async def metrics(served: Served, exchange: Exchange) -> None:
    """Answer what was served, in Prometheus' text format.

    Args:
        served: The model.
        exchange: The request.
    """
    text = served.counts.text().encode()
    await exchange.answer(200, text, "text/plain; version=0.0.4; charset=utf-8")
