"""A TCP proxy that can be told to cut all connections, to refuse new ones, and to be slow."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Proxy:
    """Listens on a port of loopback, and carries what comes to another port.

    Args:
        target: that port.
        host, port: where it listens.

    Attributes:
        target: the other port; it may change.
        delay: seconds that each piece takes more, each way.
        cut: no connection is made; those that were are broken by `cut_all`.
    """

    def __init__(self, target: int, host: str = "127.0.0.1", port: int = 0) -> None:
        self.target, self.delay, self.cut = target, 0.0, False
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, host, port))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{host}:{self.port}"

    def cut_all(self) -> None:
        """Break all connections, and make none until `mend`. They are closed when it returns."""
        self.cut = True
        self._run(self._break())

    def silence(self) -> None:
        """Carry nothing more over the connections that are, and leave them open; new ones work.

        So it is when a firewall has forgotten a connection.
        """
        self._silent |= self._writers

    def mend(self) -> None:
        """Be a good network again."""
        self.cut, self.delay = False, 0.0

    def close(self) -> None:
        """End it."""
        self.cut = True
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._silent.clear()
        await self._break()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=3)

    def _run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(5)

    async def _break(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # the loop closes the sockets in its next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            back, there = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers |= {writer, there}
            await asyncio.gather(self._carry(reader, there), self._carry(back, writer))
            self._writers -= {writer, there}
            there.close()
        writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                while writer in self._silent:
                    await asyncio.sleep(0.1)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
