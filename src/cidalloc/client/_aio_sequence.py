"""A sequence for asyncio: as `Sequence`, but awaiting."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any

from ..errors import Unavailable
from ._aio_transport import AsyncTransport
from ._drive import AsyncDriver
from ._talk import HURRY_S, Plan, Talk

__all__ = ["AsyncSequence"]

_log = logging.getLogger("cidalloc.client")


class AsyncSequence(Talk):
    """A sequence with an ID of its own; made by `AsyncClient.sequence`, used with ``async with``.

    It may be awaited, too, which also begins it; then it must be closed. All else is as with
    `Sequence`, and its methods are to be awaited.
    """

    def __init__(
        self,
        driver: AsyncDriver,
        model: str,
        begin: Callable[[], Awaitable[Plan]],
        streaming: bool,
        farewell: list[Any] | None,
        client: object,
    ) -> None:
        super().__init__(driver, driver.transport.url, model, farewell)
        self._client = client  # which would be closed if nobody had it any more
        self._transport: AsyncTransport = driver.transport
        self._beginning = begin
        self._streaming = streaming
        self._order = asyncio.Lock()
        self._pending: set[asyncio.Future[Any]] = set()
        self._stream: _Stream | None = None

    async def infer(self, inputs: list[Any], *, end: bool = False, **options: Any) -> Any:
        """Send a request and return its result; as `Sequence.infer`."""
        answer = self.async_infer(inputs, end=end, **options)
        try:
            await asyncio.wait({answer}, timeout=self._patience)  # its turn included
        finally:
            late = answer.cancel()
        if late:
            raise self._no_answer()
        return answer.result()

    def async_infer(
        self, inputs: list[Any], *, end: bool = False, **options: Any
    ) -> asyncio.Future[Any]:
        """Send a request and return the future of its result; as `Sequence.async_infer`."""
        flags = self._prepare(end, options)
        sending = self._send(inputs, end, {**options, **flags})
        task = asyncio.get_running_loop().create_task(sending)

        def settle(done: asyncio.Future[Any]) -> None:
            self._pending.discard(done)
            error = asyncio.CancelledError() if done.cancelled() else done.exception()
            self._settle(end, error)

        self._pending.add(task)
        task.add_done_callback(settle)
        return task

    async def _send(self, inputs: list[Any], end: bool, options: dict[str, Any]) -> Any:
        limit = self._patience
        try:
            if self._stream is not None:
                return await asyncio.wait_for(self._stream.send(self.model, inputs, options), limit)
            async with self._order:
                self._check_again()
                return await self._transport.infer(limit, self.model, inputs, **options)
        except asyncio.TimeoutError:
            raise self._no_answer() from None
        except Exception as error:
            raise self._explain(error)  # noqa: B904 it has its cause

    async def close(self) -> None:
        """Send the farewell, wait for what is unanswered, and give the ID back.

        Closing again does nothing.
        """
        if hasattr(self, "_plan"):
            await self._close(self._patience)

    async def _close(self, patience: float) -> None:
        self._check_fork()
        if self._life.closed:
            return
        try:
            if self._may_part():
                assert self._farewell is not None
                try:
                    farewell = self.async_infer(self._farewell, end=True)
                    await asyncio.wait_for(farewell, patience)
                except Exception as error:
                    text = error or type(error).__name__
                    _log.warning("the farewell of %r failed: %s", self, text)
            if self._pending:
                await asyncio.wait(set(self._pending), timeout=patience)
            for task in set(self._pending):
                task.cancel()
            if self._stream is not None:
                await self._stream.close()
        finally:
            self._mark_closed()

    def __await__(self) -> Generator[Any, None, AsyncSequence]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncSequence:
        self._check_fork()
        if not hasattr(self, "_plan"):
            self._begin(await self._beginning())
            if self._streaming:
                try:
                    self._stream = _Stream(self._transport)
                except BaseException:
                    self._mark_closed()
                    raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close(self._patience if error is None else HURRY_S)


class _Stream:
    """A gRPC stream; its answers are told apart by their request IDs."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._url = transport.url
        self._numbers = itertools.count(1)
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._answers = transport.open_stream(self._requests())
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def send(self, model: str, inputs: list[Any], options: dict[str, Any]) -> asyncio.Future[Any]:
        if self._reader.done():
            raise Unavailable(f"the stream to {self._url} broke: open a new sequence")
        number = str(next(self._numbers))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        request = {"model_name": model, "inputs": inputs, "request_id": number, **options}
        self._queue.put_nowait(request)
        return future

    async def _requests(self) -> AsyncIterator[dict[str, Any]]:
        while (request := await self._queue.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for result, error in self._answers:
                if error is not None:
                    # The stream does not say whose error it is, and the sequence is broken anyway.
                    self._fail(error)
                    continue
                future = self._waiting.pop(result.get_response().id, None)
                if future is not None and not future.done():
                    future.set_result(result)
            self._fail(Unavailable(f"the stream to {self._url} was closed"))
        except Exception as error:
            self._fail(Unavailable(f"the stream to {self._url} broke: {_words(error)}"))

    def _fail(self, error: BaseException) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)

    async def close(self) -> None:
        self._queue.put_nowait(None)
        # In order first; but a server that has stopped never closes its side.
        await asyncio.wait({self._reader}, timeout=HURRY_S)
        if not self._reader.done():
            self._answers.cancel()
            await asyncio.wait({self._reader}, timeout=HURRY_S)
            self._reader.cancel()


def _words(error: BaseException) -> str:
    """Return the first line of what gRPC says, whose errors run over many."""
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(error)
    return str(text or type(error).__name__).splitlines()[0]
