"""Threads for what would keep the server's loop waiting: JSON, templates, tokens, schemas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mistill.serve.refusals import busy

ResultT = TypeVar("ResultT")
ParametersT = ParamSpec("ParametersT")
_WAITING_FOR_EACH = 16


class Workers:
    """A few threads, and a bound on how many calls wait for one."""

    def __init__(self, threads: int) -> None:
        """Make the threads, which start when they are needed.

        Args:
            threads: Their number.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mistill serve")
        self._most = threads * _WAITING_FOR_EACH
        self._calls = 0

    async def run(
        self,
        function: Callable[ParametersT, ResultT],
        *arguments: ParametersT.args,
        **options: ParametersT.kwargs,
    ) -> ResultT:
        """Call a function in one of the threads.

        Args:
            function: The function.
            *arguments: What it is given.
            **options: What it is given by name.

        Returns:
            Its result.

        Raises:
            RefusalError: If too many calls wait.
        """
        if self._calls >= self._most:
            raise busy("too many requests are being read; try again later", 1)
        self._calls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: function(*arguments, **options))
        finally:
            self._calls -= 1

    def close(self) -> None:
        """Start no more calls; those that run are left to end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
