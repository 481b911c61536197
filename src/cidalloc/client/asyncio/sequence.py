"""A sequence for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any

from ..core.handle import SequenceHandle
from ..core.result import Result
from ..core.sequence import SequenceCore
from ..core.stream import Answers
from ..core.tensors import Inputs
from ..core.transport import HURRY_S
from .tasks import outlast

__all__ = ["AsyncSequence", "AsyncStreamedAnswers"]


class AsyncStreamedAnswers(Answers):
    """An iterator over the answers to one request. `AsyncSequence.stream` returns it."""

    def __aiter__(self) -> AsyncStreamedAnswers:
        return self

    async def __anext__(self) -> Result:
        try:
            return self._next(
                await self._answers.get() if self._over is None else (None, self._over)
            )
        except StopIteration:
            raise StopAsyncIteration from None


class AsyncSequence(SequenceHandle):
    """A sequence with its own correlation ID. `AsyncClient.sequence` makes it.

    Use it with ``async with``, or await it and close it. It has the methods of `Sequence`, as
    coroutines. If the task is cancelled while the sequence is closed, closing continues, and the
    cancellation is raised afterwards.
    """

    def __init__(
        self,
        model: str,
        begin: Callable[[], Awaitable[SequenceCore]],
        client: object,
        opened_at: tuple[str, int],
    ) -> None:
        super().__init__(model, client, opened_at)
        self._beginning = begin
        self._closing: asyncio.Task[None] | None = None

    async def infer(self, inputs: Inputs, *, end: bool = False, **options: Any) -> Result:
        """Send a request and return its result. See `Sequence.infer`.

        A request that is on its way continues if its task is cancelled.
        """
        return await self.async_infer(inputs, end=end, **options)

    def async_infer(
        self, inputs: Inputs, *, end: bool = False, **options: Any
    ) -> asyncio.Future[Result]:
        """Send a request and return a future of its result. See `Sequence.async_infer`."""
        self._check_home()
        core = self._begun
        future: asyncio.Future[Result] = core.submit(core.request(inputs, end, options))
        return future

    def stream(self, inputs: Inputs, *, end: bool = False, **options: Any) -> AsyncStreamedAnswers:
        """Send a request and return an asynchronous iterator over its answers.

        See `Sequence.stream`.
        """
        self._check_home()
        answers: asyncio.Queue[Any] = asyncio.Queue()
        return AsyncStreamedAnswers(self._begun.stream(inputs, end, options, answers), answers)

    async def close(self) -> None:
        """Send END with ``end_inputs`` if needed, wait for answers, and release the ID.

        A second call does nothing.
        """
        self._check_home()
        if self._core is not None:
            await self._close(self._core.limit)

    async def _close(self, patience: float) -> None:
        self._check_home()
        if self._begun.is_over:
            return
        if self._closing is None:
            runner: Any = self._begun.runner
            self._closing = runner.tasks.start(self._close_once(patience))
        await outlast(self._closing)

    async def _close_once(self, patience: float) -> None:
        core = self._begun
        try:
            for futures, limit in core.closing(patience):
                await asyncio.wait(futures, timeout=limit)
        finally:
            core.finish()

    def __await__(self) -> Generator[Any, None, AsyncSequence]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncSequence:
        self._check_home()
        if self._core is None:
            self._core = await self._beginning()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close(self._begun.limit if error is None else HURRY_S)

    def _check_home(self) -> None:
        super()._check_home()
        if self._core is not None:
            runner: Any = self._core.runner
            runner.check_loop()
