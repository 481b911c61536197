"""The exceptions of cidalloc: one class per code, and one table from code to class.

    CidError
    ├── RequestError (ValueError)          the call itself is wrong; repeating it cannot help
    │   ├── OutOfRange
    │   ├── Duplicate
    │   ├── InvalidArgument
    │   └── UnknownOperation
    ├── UnknownError (LookupError)         the ID or session does not exist
    │   ├── NotHeld
    │   └── SessionUnknown
    ├── NotOwner (PermissionError)         another client holds the ID
    ├── CapacityError (RuntimeError)       the pool or the manager has reached a limit
    │   ├── Exhausted
    │   └── LimitExceeded
    ├── StateError (RuntimeError)          the call comes too late
    │   ├── Repeated
    │   ├── SessionExpired
    │   ├── SequenceLost
    │   ├── Forked
    │   └── Draining
    ├── RegistryError (OSError)            the registry's file cannot be used
    │   ├── RegistryLocked
    │   ├── RegistryCorrupt
    │   └── RegistryMismatch
    ├── Unavailable (ConnectionError)      not now; trying again may help
    ├── ProtocolError (RuntimeError)       the other side speaks differently
    └── InternalError (RuntimeError)       a fault in cidalloc: please report it

Every exception carries its ``code``, and the number of each code never changes.
"""

from __future__ import annotations

import re
from typing import ClassVar

from .codes import Code

_DUE = re.compile(r"due in (\d+(?:\.\d+)?) s")

__all__ = [
    "CapacityError",
    "CidError",
    "Draining",
    "Duplicate",
    "Exhausted",
    "Forked",
    "InternalError",
    "InvalidArgument",
    "LimitExceeded",
    "NotHeld",
    "NotOwner",
    "OutOfRange",
    "ProtocolError",
    "RegistryCorrupt",
    "RegistryError",
    "RegistryLocked",
    "RegistryMismatch",
    "Repeated",
    "RequestError",
    "SequenceLost",
    "SessionExpired",
    "SessionUnknown",
    "StateError",
    "Unavailable",
    "UnknownError",
    "UnknownOperation",
    "error_for",
]


class CidError(Exception):
    """Any error of cidalloc. People read the message; programs use ``code``."""

    code: ClassVar[Code]
    answered = False
    """True if the manager sent this error: it has not done the operation. Otherwise it may have."""
    cid: int | None = None
    """The refused ID of the pool; None if the error is about something else."""
    position: int | None = None
    """Its index in a call with several IDs; None in other calls."""


class RequestError(CidError, ValueError):
    """The call itself is wrong: repeating it cannot help."""


class OutOfRange(RequestError):
    """The ID lies outside the pool."""

    code = Code.OUT_OF_RANGE


class Duplicate(RequestError):
    """The same ID is given twice in one call, or an ID to reserve is held."""

    code = Code.DUPLICATE


class InvalidArgument(RequestError):
    """A value, type or shape that the operation does not accept."""

    code = Code.INVALID_ARGUMENT


class UnknownOperation(RequestError):
    """The manager does not know this operation."""

    code = Code.UNKNOWN_OPERATION


class UnknownError(CidError, LookupError):
    """The ID or session of the call does not exist."""


class NotHeld(UnknownError):
    """The ID is not held."""

    code = Code.NOT_HELD


class SessionUnknown(UnknownError):
    """The manager does not know this session: it was closed, has expired, or never was."""

    code = Code.SESSION_UNKNOWN


class NotOwner(CidError, PermissionError):
    """Another client holds this ID."""

    code = Code.NOT_OWNER


class CapacityError(CidError, RuntimeError):
    """The pool or the manager has reached a limit."""


class Exhausted(CapacityError):
    """No ID can be issued now. The text says when the next one is due, if one is cooling."""

    code = Code.EXHAUSTED

    @property
    def due_s(self) -> float | None:
        """Seconds until the next ID of the pool is due, by the text; None if none is cooling.

        An ID that was released later may be due earlier. If it is 0, the pool has free IDs, but too
        few of them.
        """
        found = _DUE.search(str(self))
        return float(found[1]) if found else None

    @property
    def others_wait(self) -> bool:
        """Whether the next IDs are for requests that came before this one."""
        return "others wait before" in str(self)


class LimitExceeded(CapacityError):
    """More than a setting of the manager allows."""

    code = Code.LIMIT_EXCEEDED


class StateError(CidError, RuntimeError):
    """The call comes too late: the state has changed."""


class Repeated(StateError):
    """This change, or a later one of its session, came before."""

    code = Code.REPEATED


class SessionExpired(StateError):
    """No heartbeat was answered in time: the session's IDs must not be used any more."""

    code = Code.SESSION_EXPIRED


class SequenceLost(StateError):
    """The server has forgotten the sequence, or may have forgotten it."""

    code = Code.SEQUENCE_LOST


class Forked(StateError):
    """The object belongs to the parent process; make a new one after the fork."""

    code = Code.FORKED


class Draining(StateError):
    """The server is being drained: no new sequence begins there, and running ones continue."""

    code = Code.DRAINING


class RegistryError(CidError, OSError):
    """The registry's file cannot be used."""


class RegistryLocked(RegistryError):
    """Another process writes the registry's file."""

    code = Code.REGISTRY_LOCKED


class RegistryCorrupt(RegistryError):
    """The file is damaged, truncated, or not a registry."""

    code = Code.REGISTRY_CORRUPT


class RegistryMismatch(RegistryError):
    """The registry was made with other settings, or is another one."""

    code = Code.REGISTRY_MISMATCH


class Unavailable(CidError, ConnectionError):
    """The server or manager does not answer now: trying again may help."""

    code = Code.UNAVAILABLE


class ProtocolError(CidError, RuntimeError):
    """The answer does not follow the protocol."""

    code = Code.PROTOCOL


class InternalError(CidError, RuntimeError):
    """A fault in cidalloc: please report it."""

    code = Code.INTERNAL


def _leaves(parent: type[CidError]) -> dict[Code, type[CidError]]:
    found = {parent.code: parent} if "code" in vars(parent) else {}
    for child in parent.__subclasses__():
        found |= _leaves(child)
    return found


_CLASS_OF = _leaves(CidError)


def error_for(code: int, message: str, unknown: type[CidError] = ProtocolError) -> CidError:
    """Return the exception of ``code`` with ``message``.

    A number that this version does not know becomes an ``unknown`` that names it.
    """
    try:
        return _CLASS_OF[Code(code)](message)
    except (KeyError, ValueError):
        return unknown(f"unknown error code {code}: {message}")
