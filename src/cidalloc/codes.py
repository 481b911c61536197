"""The numbers of the protocol: the operations of requests, and the codes of errors.

Both lists are append-only: a released number keeps its name and its meaning.
"""

from enum import IntEnum, unique

__all__ = ["Code", "Operation"]


@unique
class Operation(IntEnum):
    """The operation of a request: the value of the input tensor ``CODE``."""

    NEW = 0
    """Issue IDs."""
    DELETE = 1
    """Release IDs."""
    ACTIVE = 2
    """How many IDs are held."""
    INACTIVE = 3
    """How many IDs were released and not issued again."""
    PEAK = 4
    """The most IDs that were held at the same time since the manager was started."""
    OPEN = 5
    """Open a session."""
    RENEW = 6
    """Renew a session's lease. NEW, DELETE and HELD with its token renew it, too."""
    CLOSE = 7
    """End a session and release its IDs."""
    HELD = 8
    """Which IDs a session holds."""
    STATUS = 9
    """Return the manager's status as JSON in DETAIL."""
    DEAD = 10
    """Which IDs of expired sessions need END on a model."""


@unique
class Code(IntEnum):
    """The result of an operation. 0 is success; every other code has one exception class."""

    OK = 0
    EXHAUSTED = 1
    """No ID can be issued: all are held, cooling, or pinned by their block."""
    NOT_HELD = 2
    """The ID is in the pool, but is not held."""
    NOT_OWNER = 3
    """Another client holds the ID."""
    OUT_OF_RANGE = 4
    """The ID lies outside the pool: 0, negative, or beyond an end."""
    DUPLICATE = 5
    """The same ID is given twice in one call."""
    INVALID_ARGUMENT = 6
    """A value, type or shape that the operation does not accept."""
    UNKNOWN_OPERATION = 7
    """This manager has no operation with this ``CODE``."""
    SESSION_UNKNOWN = 8
    """No such session: it was never opened, was closed, or has expired."""
    LIMIT_EXCEEDED = 9
    """More than a setting of the manager allows."""
    REPEATED = 10
    """A change with this ``seq`` or a later one came before."""
    REGISTRY_LOCKED = 11
    """Another process writes the registry's file."""
    REGISTRY_CORRUPT = 12
    """The registry's file is damaged, truncated, or not a registry."""
    REGISTRY_MISMATCH = 13
    """The registry has other settings, or is not the expected one."""
    UNAVAILABLE = 14
    """The manager cannot be reached or cannot answer now; trying again may help."""
    PROTOCOL = 15
    """The answer does not follow the protocol."""
    INTERNAL = 16
    """A fault in cidalloc."""
    SESSION_EXPIRED = 17
    """The client's lease ended before a heartbeat was answered. Client only."""
    SEQUENCE_LOST = 18
    """The server has forgotten the sequence, or may have forgotten it. Client only."""
    FORKED = 19
    """The object belongs to the parent process of this fork. Never sent."""
    DRAINING = 20
    """The server is being drained: it issues no more IDs, and opens no session."""
