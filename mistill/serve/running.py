"""A server from its start to its end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from mistill.errors import FolderError, SettingsError, VocabularyError, missing_extra
from mistill.folders.folder import open_folder
from mistill.serve.http.keys import read_keys
from mistill.serve.settings import MODEL_NAME, Limits, ServeSettings
from mistill.settings import require, settings_from
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from mistill.serve.generation import Served
    from mistill.serve.http.server import Server
    from mistill.serve.options import ServeOptions

_log = logging.getLogger("mistill.serve")


def serve(
    folder: str | Path,
    *,
    settings: ServeSettings | None = None,
    limits: Limits = Limits(),
    started: Callable[[Server], None] | None = None,
    **options: Unpack[ServeOptions],
) -> int:
    """Serve a chatbot over HTTP until this process is told to stop.

    Args:
        folder: The ONNX folder of a chatbot, as ``mistill export`` writes it, or its Hub id.
        settings: Where and to whom; or give the fields as options.
        limits: What one client may take.
        started: Called once requests are answered, with the server, which it may stop.
        **options: Fields of ``ServeSettings``.

    Returns:
        0 after it was told to stop, 1 if the engine crashed.

    Raises:
        MissingExtraError: If uvicorn is not installed.
        SettingsError: If the address is taken, or one of a network and there is no key.
        FolderError: If the folder is no ONNX folder.
        VocabularyError: If it has no chat template, or one that does not end.
    """
    settings = settings_from(ServeSettings, settings, options)
    keys = read_keys(settings)
    try:
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("uvicorn", "serve") from error
    from mistill.serve.app import App
    from mistill.serve.http.server import run_server

    if not keys and not settings.is_local:
        _log.warning("everybody who reaches %s may use this server: it has no key", settings.host)
    listening = _listen(settings)
    try:
        served = open_served(folder, settings, limits)
        try:
            return run_server(App(served, keys), listening, started)
        finally:
            served.scheduler.close()
            served.workers.close()
    finally:
        listening.close()


def open_served(folder: str | Path, settings: ServeSettings, limits: Limits) -> Served:
    """Open a chatbot to be served.

    Args:
        folder: An ONNX folder.
        settings: How it is served.
        limits: What one client may take.

    Returns:
        The model, running.

    Raises:
        FolderError: If the folder is no ONNX folder.
        VocabularyError: If it has no chat template, or one that does not end.
        SettingsError: If a setting does not fit the model.
    """
    from mistill.engine.onnx_model import OnnxModel
    from mistill.engine.sampling import own_sampling
    from mistill.engine.scheduler import Scheduler
    from mistill.serve.generation import Served
    from mistill.serve.replies import DueInboxes

    info = open_folder(resolve_model(folder))
    if info.form != "onnx":
        raise FolderError(
            f"{folder} is {info.kind}, and an ONNX folder is served; make one with: mistill export"
        )
    vocabulary = load_vocabulary(info.path)
    _check_template(vocabulary, folder)
    name = settings.model_name or info.path.resolve().name
    require(
        MODEL_NAME.fullmatch(name) is not None,
        f"the folder's name {name!r:.80} cannot be the name of the model; give --model-name",
    )
    sampling = settings.sampling(own_sampling(info.path))
    model = OnnxModel(
        info.path,
        threads=settings.threads,
        context=settings.context,
        provider=settings.provider,
    )
    due = DueInboxes(settings.stream_interval_ms / 1000)
    scheduler = Scheduler(
        model,
        slots=settings.slots,
        queue=settings.queue,
        prefix_bytes=None if settings.prefix_mib is None else settings.prefix_mib << 20,
        after_tokens=due.tell,
        unnoticed_seconds=due.interval_seconds,
    )
    return Served(name, vocabulary, scheduler, settings, sampling, limits, due)


def _check_template(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Refuse a chatbot that could not hold a conversation."""
    if vocabulary.chat_template is None:
        raise VocabularyError(
            f"{folder} has no chat template, so it cannot hold a conversation; use a chat model, "
            "or write a template to chat_template.jinja"
        )
    prompt_ids(Conversation(({"role": "user", "content": "?"},)), vocabulary)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"the server cannot listen on {settings.host} port {settings.port}: {reason}; give "
            "another --host or --port"
        ) from error
