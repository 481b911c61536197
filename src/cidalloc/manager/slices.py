"""Slices: disjoint parts of a pool, one for each of several servers.

A slice is written as ``3/64``, the fourth of 64 equal parts; as ``auto/64``, where the ordinal of a
StatefulSet says which part; or as ``random``, which is not a part of the pool, but one of 2**38
pools of its own.
"""

from __future__ import annotations

import re
import secrets

from ..errors import InvalidArgument

__all__ = ["RANDOM", "check", "is_random", "numbers", "on_host", "pool"]

RANDOM = "random"

_RANDOM_FIRST, _RANDOM_CAPACITY, _RANDOM_SLICES = 2**62, 2**24, 2**38
_FORM = re.compile(r"(auto|0|[1-9][0-9]{0,11})/([1-9][0-9]{0,11})")
_ORDINAL = re.compile(r".*-(0|[1-9][0-9]*)")
_ADDRESS = re.compile(r"ip(-[0-9]+){4}")  # as host names of clouds
# The name of a Deployment's pod ends in five characters, which have no 0 and no 1, and may all be
# digits: then they are at least 22222.
_MOST_ORDINALS = 2**14


def check(text: str, capacity: int) -> None:
    """Raise `InvalidArgument` if a pool of so many IDs has no such slice."""
    if type(text) is str and text in ("", RANDOM):
        return
    match = _FORM.fullmatch(text) if type(text) is str else None
    if match is None:
        raise InvalidArgument(
            f"slice={text!r} is not of the form K/N (for example 3/64), auto/N or random"
        )
    number, count = match[1], int(match[2])
    if count & (count - 1) or capacity % count:
        raise InvalidArgument(
            f"slice={text!r}: {count} is not a power of two that divides the capacity, {capacity}"
        )
    if number != "auto" and int(number) >= count:
        raise InvalidArgument(f"slice={text!r}: {count} slices have the numbers 0 to {count - 1}")
    if number == "auto" and count > _MOST_ORDINALS:
        raise InvalidArgument(f"slice={text!r}: auto takes at most {_MOST_ORDINALS} slices")


def on_host(text: str, host: str) -> str:
    """Return the slice on a host: for ``auto/N`` the host name's ordinal decides.

    Raises:
        InvalidArgument: the host name has no ordinal below N.
    """
    if not text.startswith("auto/"):
        return text
    name, count = host.partition(".")[0], int(text.removeprefix("auto/"))
    match = None if _ADDRESS.fullmatch(name) else _ORDINAL.fullmatch(name)
    if match is None:
        raise InvalidArgument(
            f"slice={text!r} needs the host name of a StatefulSet's pod, which ends in a dash and"
            f" an ordinal, and this host is {host!r}: run the server in a StatefulSet, or set"
            " slice=K/N with another K for each server, or slice=random if all models have a"
            " CORRID of 64 bits"
        )
    if int(match[1]) >= count:
        raise InvalidArgument(
            f"slice={text!r}: the host name {host!r} has the ordinal {match[1]}, which is not below"
            f" {count}: choose a larger power of two for all servers"
        )
    return f"{match[1]}/{count}"


def numbers(text: str) -> tuple[int, int]:
    """Return number and count of a fixed slice; (0, 0) for a random one and for none."""
    number, slash, count = text.partition("/")
    return (int(number), int(count)) if slash else (0, 0)


def pool(text: str, first: int, capacity: int) -> tuple[int, int]:
    """Return first ID and capacity of a slice of a pool; a random one is drawn anew."""
    if text == RANDOM:
        return _RANDOM_FIRST + secrets.randbelow(
            _RANDOM_SLICES
        ) * _RANDOM_CAPACITY, _RANDOM_CAPACITY
    number, count = numbers(text)
    return (first + number * (capacity // count), capacity // count) if count else (first, capacity)


def is_random(first: int, capacity: int) -> bool:
    """Tell whether a pool can be a random slice."""
    place = first - _RANDOM_FIRST
    return capacity == _RANDOM_CAPACITY and place >= 0 and place % _RANDOM_CAPACITY == 0
