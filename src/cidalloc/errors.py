"""The exceptions of cidalloc: one class per code, and one table from code to class.

::

    CidError
    ├── RequestError (ValueError)          the call itself is wrong; repeating it cannot help
    │   ├── OutOfRange
    │   ├── Duplicate
    │   ├── InvalidArgument
    │   └── UnknownOperation
    ├── UnknownError (LookupError)         what the call names is not there
    │   ├── NotHeld
    │   └── SessionUnknown
    ├── NotOwner (PermissionError)         it is there, and somebody else's
    ├── CapacityError (RuntimeError)       the manager or the pool has no more to give
    │   ├── Exhausted
    │   └── LimitExceeded
    ├── StateError (RuntimeError)          too late: the world has moved on
    │   ├── Repeated
    │   ├── SessionExpired
    │   ├── SequenceLost
    │   └── Forked
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

from typing import ClassVar

from .codes import Code

__all__ = [
    "CapacityError",
    "CidError",
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
    """Any error of cidalloc. The message is for a person, ``code`` for a program."""

    code: ClassVar[Code]
    answered = False
    """The manager itself said so: the operation was not done. Otherwise it may have been."""
    position: int | None = None
    """Where in a call with several IDs the refused one stands, from 0; None if it is unknown."""


class RequestError(CidError, ValueError):
    """The call is wrong in itself: repeating it cannot help."""


class OutOfRange(RequestError):
    """The ID lies outside the pool."""

    code = Code.OUT_OF_RANGE


class Duplicate(RequestError):
    """The same ID stands twice in one call."""

    code = Code.DUPLICATE


class InvalidArgument(RequestError):
    """A value, type or shape that the operation does not take."""

    code = Code.INVALID_ARGUMENT


class UnknownOperation(RequestError):
    """The manager does not know this operation."""

    code = Code.UNKNOWN_OPERATION


class UnknownError(CidError, LookupError):
    """What the call names is not there."""


class NotHeld(UnknownError):
    """Nobody holds this ID."""

    code = Code.NOT_HELD


class SessionUnknown(UnknownError):
    """The manager does not know this session, or knows it no more."""

    code = Code.SESSION_UNKNOWN


class NotOwner(CidError, PermissionError):
    """Somebody else holds this ID."""

    code = Code.NOT_OWNER


class CapacityError(CidError, RuntimeError):
    """The pool or the manager has no more to give."""


class Exhausted(CapacityError):
    """No ID may be issued now."""

    code = Code.EXHAUSTED


class LimitExceeded(CapacityError):
    """More than a setting of the manager allows."""

    code = Code.LIMIT_EXCEEDED


class StateError(CidError, RuntimeError):
    """Too late: the world has moved on."""


class Repeated(StateError):
    """This change was applied before."""

    code = Code.REPEATED


class SessionExpired(StateError):
    """No heartbeat was answered in time: the session's IDs must not be used any more."""

    code = Code.SESSION_EXPIRED


class SequenceLost(StateError):
    """The server has forgotten the sequence, or may have."""

    code = Code.SEQUENCE_LOST


class Forked(StateError):
    """The object belongs to the parent process; make a new one after the fork."""

    code = Code.FORKED


class RegistryError(CidError, OSError):
    """The registry's file cannot be used."""


class RegistryLocked(RegistryError):
    """Another process writes the registry."""

    code = Code.REGISTRY_LOCKED


class RegistryCorrupt(RegistryError):
    """The file is damaged, truncated, or not a registry."""

    code = Code.REGISTRY_CORRUPT


class RegistryMismatch(RegistryError):
    """The registry was made with other settings, or is another one."""

    code = Code.REGISTRY_MISMATCH


class Unavailable(CidError, ConnectionError):
    """Not reachable, not healthy, or handing over: trying again may help."""

    code = Code.UNAVAILABLE


class ProtocolError(CidError, RuntimeError):
    """The other side's answer is not of this protocol."""

    code = Code.PROTOCOL


class InternalError(CidError, RuntimeError):
    """A fault in cidalloc itself: please report it."""

    code = Code.INTERNAL


def _leaves(parent: type[CidError]) -> dict[Code, type[CidError]]:
    found = {parent.code: parent} if "code" in vars(parent) else {}
    for child in parent.__subclasses__():
        found |= _leaves(child)
    return found


_CLASS_OF = _leaves(CidError)


def error_for(code: int, message: str) -> CidError:
    """Return the exception of ``code`` with ``message``.

    A number that this version does not know becomes a `ProtocolError` that names it.
    """
    try:
        return _CLASS_OF[Code(code)](message)
    except (KeyError, ValueError):
        return ProtocolError(f"unknown error code {code}: {message}")
