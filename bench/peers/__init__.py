"""The peers: other ways to hand out unique IDs, each as good as its own idea allows.

`PEERS` are pools: they issue an ID, and take it back. `NUMBERS` only make one. What each of them
does for its caller, `does`, is the source of the table of the documentation and of the tests.
"""

from .base import DUTIES, Full, Peer, Refused
from .libraries import Bits, IntBits, NumpyStack, Roaring, Sorted
from .numbers import (
    Counter,
    FastUuid,
    Numbers,
    RandomBits,
    RandomSet,
    SecretBits,
    Uuid,
    UuidSet,
    UuidUtils,
)
from .plain import DequeSet, FullPython, HeapSet, ListSet, Unchecked

__all__ = [
    "DUTIES",
    "NUMBERS",
    "PEERS",
    "Full",
    "FullPython",
    "Numbers",
    "NumpyStack",
    "Peer",
    "Refused",
    "UuidSet",
]

PEERS: tuple[type[Peer], ...] = (
    Unchecked,
    ListSet,
    DequeSet,
    HeapSet,
    Sorted,
    RandomSet,
    UuidSet,
    Bits,
    IntBits,
    Roaring,
    NumpyStack,
    FullPython,
)
NUMBERS: tuple[type[Numbers], ...] = (
    Counter,
    RandomBits,
    SecretBits,
    Uuid,
    UuidUtils,
    FastUuid,
)
