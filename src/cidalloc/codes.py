"""The numbers of the protocol: operations that a request asks for, codes that an answer carries.

Both lists are append-only: a number, once released, keeps its name and its meaning.
"""

from enum import IntEnum, unique

__all__ = ["Code", "Operation"]


@unique
class Operation(IntEnum):
    """What a request asks the manager to do: the value of the input tensor ``CODE``."""

    NEW = 0
    """Issue IDs."""
    DELETE = 1
    """Give IDs back."""
    ACTIVE = 2
    """How many IDs are held."""
    INACTIVE = 3
    """How many IDs have been given back and not been issued again."""
    PEAK = 4
    """The most IDs that were held at once since the manager was started."""
    OPEN = 5
    """Open a session."""
    RENEW = 6
    """Say that a session lives. NEW, DELETE and HELD with its token say so, too."""
    CLOSE = 7
    """End a session and give back what it holds."""
    HELD = 8
    """Which IDs a session holds."""
    STATUS = 9
    """How the manager is, as JSON in DETAIL."""


@unique
class Code(IntEnum):
    """How an operation ended. 0 is success; every other code has one exception class."""

    OK = 0
    EXHAUSTED = 1
    """No ID may be issued: all are held, cooling, or pinned by their block."""
    NOT_HELD = 2
    """The ID is in the pool, but nobody holds it."""
    NOT_OWNER = 3
    """Somebody else holds the ID."""
    OUT_OF_RANGE = 4
    """The ID lies outside the pool: 0, negative, or beyond an end."""
    DUPLICATE = 5
    """The same ID stands twice in one call."""
    INVALID_ARGUMENT = 6
    """A value, type or shape that the operation does not take."""
    UNKNOWN_OPERATION = 7
    """``CODE`` names no operation of this manager."""
    SESSION_UNKNOWN = 8
    """No such session: it was never opened, was closed, or has expired."""
    LIMIT_EXCEEDED = 9
    """More than a setting of the manager allows."""
    REPEATED = 10
    """A change with this sequence number was applied already."""
    REGISTRY_LOCKED = 11
    """Another process writes the registry."""
    REGISTRY_CORRUPT = 12
    """The registry's file is damaged, truncated, or not a registry."""
    REGISTRY_MISMATCH = 13
    """The registry was made with other settings, or is not the one that was meant."""
    UNAVAILABLE = 14
    """The manager cannot be reached or cannot answer now; trying again may help."""
    PROTOCOL = 15
    """An answer that this version of the protocol does not allow."""
    INTERNAL = 16
    """A fault in cidalloc itself."""
    SESSION_EXPIRED = 17
    """The client's own session ran out before a heartbeat was answered. Client only."""
    SEQUENCE_LOST = 18
    """The server has forgotten the sequence, or may have. Client only."""
    FORKED = 19
    """The object belongs to the parent process of this fork. Never sent."""
