"""The takeover of the registry's file by a new process of the same server.

On a reload, Triton starts the new process while the old one still serves. It ends the old one only
after the new one's ``initialize`` has returned, or much later. So the new process does not block.
If a process of its own server has the file, or one of a server that has ended, it requests the file
and answers UNAVAILABLE until it has it. The old process sees the request, lets go of the file, and
answers UNAVAILABLE from then on. If a process of another running server has the file, that is an
error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..errors import CidError, InvalidArgument, RegistryLocked, Unavailable
from .recovery import shape_for
from .registry import Registry
from .settings import Settings
from .storage import drain
from .storage.failures import is_passing, unusable
from .storage.file import Storage
from .storage.file_lock import TakeoverRequest, process_id, writer_of

__all__ = ["RegistryHolder", "boot_id", "server_pid"]

_log = logging.getLogger("cidalloc.manager.takeover")

OWNER_POLL_S = 0.1
"""Seconds between two calls of `RegistryHolder.poll` in a process that has the file."""
WAITING_POLL_S = 0.005
"""The same in a process that waits for the file."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNSEEN_MS = 5_000  # the manager of a killed server has ended by then
_TAKE_BACK_MS = 3_000  # if the file was free for so long, the process that requested it is gone


def boot_id() -> bytes:
    """Return 16 bytes that identify this boot of the machine.

    Raises:
        InvalidArgument: the kernel does not let them be read.
        Unavailable: the machine fails.
    """
    try:
        return bytes.fromhex(_BOOT_ID.read_text().replace("-", ""))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise unusable(_BOOT_ID, error) from None
        raise InvalidArgument(
            f"cannot read {_BOOT_ID}, which identifies this boot of the machine: {error};"
            " let the server read it, or keep no file: 'cidalloc model -o --no-state DIR'"
        ) from None


def server_pid() -> int:
    """Return the process ID of the server that started this process.

    The server may have ended since. Then the parent is another process, but the fifth argument has
    the server's process ID (`StubLauncher` in
    https://github.com/triton-inference-server/python_backend).
    """
    parent = os.getppid()
    program, *words = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
    if str(parent) in words or "triton_python_backend_stub" not in program or len(words) < 5:
        return parent
    ended = words[4].isdigit() and not process_id(int(words[4]))
    return int(words[4]) if ended else parent


class RegistryHolder:
    """The registry, while this process has it.

    Args:
        settings: those on this host; ``state`` is the folder of the file.
        name: the file's name in that folder, without its suffix.
        clock: returns the time in milliseconds.
        server: the `process_id` of our server; of the parent process if it is left out.

    Raises what `Storage.open` does, and `RegistryLocked` only if a running process of another
    server has the file.
    """

    def __init__(
        self, settings: Settings, name: str, clock: Callable[[], int], server: int | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._server = process_id(os.getppid()) if server is None else server
        self._path = Path(settings.state) / f"{name}.cidalloc" if settings.state else None
        self._registry: Registry | None = None
        self._takeover_request: TakeoverRequest | None = None
        self._let_go_at: int | None = None
        self._unseen_since: int | None = None  # the process with the file is not visible here
        self._trouble = "the registry is still with the process before"
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        if self._path is None:
            self._registry = Registry(self._settings, self._clock())
            self._log_start("opened")
            return
        try:
            self._take()
        except RegistryLocked:
            _, writer = writer_of(self._path)
            # The low bits of a process_id are its pid.
            alive = writer != 0 and process_id(writer & 2**22 - 1) == writer
            if alive and writer != self._server:
                raise
            self._unseen_since = None if alive else self._clock()
            # An error of ours must show now, while the old process still has the file.
            Storage.expect(self._path, shape_for(self._settings))
            self._takeover_request = TakeoverRequest(self._path)
            self.poll()

    @property
    def waits(self) -> bool:
        """Whether this process waits for the file."""
        return self._takeover_request is not None

    def registry(self) -> Registry:
        """Return the registry.

        Raises:
            Unavailable: another process has it, or is about to.
            RegistryLocked: a process that is not visible here has it, and does not end.
        """
        registry = self._registry or self._taken_back()
        if registry is None:
            unseen = self._unseen_since
            if unseen is not None and self._clock() - unseen >= _UNSEEN_MS:
                raise RegistryLocked(
                    f"{self._trouble}; that process is not visible from here: is it in another"
                    " container, or was it stopped?"
                )
            raise Unavailable(f"{self._trouble}; try again")
        return registry

    def begin_anew(self, changes: int) -> Registry:
        """Return the registry as another one, since an older content of its file was put back.

        Args:
            changes: how many it had, as a client has proved.

        Raises what `registry` does.
        """
        assert self._registry is not None
        _log.warning(
            "%s: a client has seen a later state of the registry %s: an older content was put back."
            " All sessions are over, and no ID is issued while others may be in use",
            *(self._path or "no file", self._registry.uuid),
        )
        self._registry.store.disown(changes)
        self._registry.close()
        self._registry, self._let_go_at = None, self._clock()
        self._trouble = "the registry is opened again, since its content is an older one"
        if self._path is None:
            self._begin()
        else:
            self._try_take()
        return self.registry()

    def _taken_back(self) -> Registry | None:
        """Try to take the file back, if the process that requested it has not taken it for long."""
        now = self._clock()
        if self._let_go_at is not None and now - self._let_go_at >= _TAKE_BACK_MS:
            self._let_go_at = now
            self._try_take()
        return self._registry

    def poll(self) -> None:
        """Take the file, or let go of it, if it is time to; else let time pass in the registry."""
        if self._takeover_request is not None:
            # Of several processes that wait, the one with the request may take it.
            if self._takeover_request.make():
                self._try_take()
        elif self._registry is not None:
            requester = self._registry.store.takeover_requested_by()
            if requester and requester == self._server:
                _log.info("handing %s over to a newer process", self._path)
                self._let_go_at = self._clock()
                self._trouble = "a newer process has the registry"
                self._registry.close()
                self._registry = None
            else:
                now = self._clock()
                self._registry.tick(now)  # first: a forked child has no header
                self._registry.expired.log_suppressed(now)
                header = self._registry.store.header
                if drain.answer(header):
                    on = "begins" if drain.is_draining(header) else "is over"
                    _log.info("%s: the drain %s", self._path, on)

    def close(self) -> None:
        """Let go of the file for good."""
        if self._takeover_request is not None:
            self._takeover_request.close()
            self._takeover_request = None
        if self._registry is not None:
            self._registry.close()
            self._registry = None
        self._let_go_at = None
        self._trouble = "this process has ended its work"

    def _try_take(self) -> None:
        try:
            self._take()
        except RegistryLocked as error:
            self._trouble = str(error)
        except CidError as error:
            if str(error) != self._trouble:
                _log.error("cannot take over the registry: %s", error)
            self._trouble = str(error)
            if self._takeover_request is not None and not isinstance(error, Unavailable):
                # Waiting does not help, and the old process may take the file back.
                self._takeover_request.close()
                self._takeover_request, self._let_go_at = None, self._clock()

    def _take(self) -> None:
        assert self._path is not None
        how = "took over" if self.waits or self._let_go_at is not None else "opened"
        self._registry = Registry.in_file(self._path, self._settings, self._clock(), boot_id())
        self._let_go_at = self._unseen_since = None
        request, self._takeover_request = self._takeover_request, None
        if request is not None:
            request.close()
        self._log_start(how)

    def _log_start(self, how: str) -> None:
        registry = self._registry
        assert registry is not None
        table, pool = registry.sessions, registry.pool
        _log.info(
            "cidalloc %s %s the registry %s: pool %d to %d%s, %s, sessions: %d, IDs held: %d",
            *(__version__, how, registry.uuid, pool.first, pool.first + pool.capacity - 1),
            f", slice {self._settings.slice}" if self._settings.slice else "",
            f"file {self._path}" if self._path else "no file",
            *(len(table.named), pool.active),
        )
