"""gRPC: channels, and how many requests are on their way over each.

gRPC cancels requests when their channel is closed; so a channel is closed after its last request.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from ...errors import CidError, InvalidArgument, Unavailable
from .transport import unreachable

__all__ = ["Connection", "Connections"]

_MOST_AT_ONCE = 100
# Proxies allow about so many requests on one connection; gRPC makes further ones wait.


class Connection:
    """A channel, its methods, and the number of requests on their way over it."""

    __slots__ = ("busy", "channel", "config", "infer", "stream", "version", "was_ready")

    def __init__(self, channel: Any) -> None:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.channel = channel
        self.infer, self.stream = stub.ModelInfer, stub.ModelStreamInfer
        self.config, self.version = stub.ModelConfig, stub.ServerMetadata
        self.busy = 0
        self.was_ready = False


class Connections:
    """The channels of a client for one purpose.

    Args:
        make: makes a channel.
        shut: closes one.
        is_ready: whether a channel is connected.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        shut: Callable[[Any], object],
        is_ready: Callable[[Any], bool],
    ) -> None:
        self._make, self._shut, self._is_ready = make, shut, is_ready
        self._broke = False
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._usable: list[Connection] = []
        self._closed = False

    def take(self) -> Connection:
        """Return a connection for one request or stream; the caller releases it afterwards.

        Raises:
            InvalidArgument: the client is closed.
        """
        connection = self._with_room()
        if connection is None:
            # Not under the lock of the others: garbage may be collected meanwhile, and a channel
            # among it waits for its requests to end, which `release` their connections.
            with self._making:
                connection = self._with_room() or self._new()
        assert connection is not None
        return connection

    def _new(self) -> Connection | None:
        connection = Connection(self._make())
        try:
            return self._with_room(connection)
        except InvalidArgument:  # the client was closed meanwhile
            self._shut(connection.channel)
            raise

    def _with_room(self, new: Connection | None = None) -> Connection | None:
        """Return a connection that can take one more request, which is counted; or None."""
        with self._lock:
            if self._closed:
                raise InvalidArgument("this client is closed")
            if new is not None:
                self._usable.append(new)
            for connection in self._usable:
                if connection.busy < _MOST_AT_ONCE:
                    connection.busy += 1
                    return connection
        return None

    def broke(self) -> bool:
        """Return whether a connection has broken since the last call. It takes a microsecond."""
        for connection in self._usable:
            ready = self._is_ready(connection.channel)
            if connection.was_ready and not ready:
                self._broke = True
            connection.was_ready = ready
        broke, self._broke = self._broke, False
        return broke

    def retire(self, connection: Connection) -> None:
        """Send nothing more over a connection, since a request on it was not answered."""
        self._broke = True
        with self._lock:
            used = connection in self._usable
            if used:
                self._usable.remove(connection)
            last = used and not connection.busy  # gRPC may tell of the end of a request first
        if last:
            self._shut(connection.channel)

    def failed(self, connection: Connection, error: Any, url: str) -> InferenceServerException:
        """Return tritonclient's exception for gRPC's; if no answer came, retire the connection.

        Raise it outside the ``except`` block: gRPC's error as its context would keep the connection
        open, also if it is closed, until garbage is collected.
        """
        found = _explained(error)
        if unreachable(found, url):
            self.retire(connection)
        return found

    def release(self, connection: Connection) -> None:
        """Note that a request is over; close a retired connection after its last request."""
        connection.was_ready = True
        with self._lock:
            connection.busy -= 1
            last = not connection.busy and connection not in self._usable
        if last:
            self._shut(connection.channel)

    def give_up(self, connection: Connection, error: BaseException) -> None:
        """Retire a connection on which a request could not begin.

        Raises:
            Unavailable: the system refuses a thread.
        """
        self.retire(connection)
        if isinstance(error, RuntimeError | MemoryError) and not isinstance(error, CidError):
            # gRPC would wait for that thread for ever when the channel is closed or collected.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection.channel))
            raise Unavailable(f"no thread can be started: {error}") from error

    def close(self) -> None:
        """Close the connections, each after its last request."""
        with self._lock:
            self._closed = True
            idle = [connection for connection in self._usable if not connection.busy]
            self._usable.clear()
        for connection in idle:
            self._shut(connection.channel)


def _explained(error: Any) -> InferenceServerException:
    """Return tritonclient's exception for an exception of gRPC, as tritonclient does."""
    code = error.code()
    text = error.details() or ""
    # A call whose answer could not be read has none, and gRPC would wait for it for ever.
    state = getattr(error, "_state", None)
    known = state is None or state.debug_error_string is not None
    debug = error.debug_error_string() if known else None
    return InferenceServerException(text, str(code), debug)
