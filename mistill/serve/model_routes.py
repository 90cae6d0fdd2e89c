"""What a client may ask about the model and the server."""

from __future__ import annotations

import time
from typing import Any

from mistill.serve.generation import Served
from mistill.serve.http.exchange import Exchange
from mistill.serve.refusals import RefusalError, unavailable

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
