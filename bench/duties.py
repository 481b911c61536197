"""What a contestant does for its caller, found out by trying: one function for each duty.

Each function returns whether the contestant does it. The tests compare that with what the peers say
of themselves, in both directions, so no cell of the table of the documentation is only a claim.
"""

from __future__ import annotations

import os
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import numpy as np
from peers import DUTIES, NUMBERS, PEERS, Full, Refused
from workloads import FIRST, OURS, make

from cidalloc.errors import CidError, Exhausted

OURS_DO = frozenset(DUTIES) - {"lowest", "apart"}
CLAIMS: dict[str, frozenset[str]] = {
    **{name: OURS_DO - {"every"} for name in OURS},
    "cidalloc 1": OURS_DO,
    **{peer.name: peer.does for peer in (*PEERS, *NUMBERS)},
}
"""What each contestant says that it does."""

Make = Callable[[int], Any]


def does(name: str, duty: str) -> bool:
    """Find out whether a contestant does its duty."""
    try:
        return bool(globals()[duty](lambda capacity: make(name, capacity)))
    except (AttributeError, TypeError):  # it has no such method, or no such argument
        return False


def outcome(call: Callable[..., Any], *arguments: Any) -> str:
    """Tell how a call ends: full, refused or done."""
    try:
        call(*arguments)
    except (Full, Exhausted):
        return "full"
    except (Refused, CidError):
        return "refused"
    return "done"


def many(pool: Any, ids: Iterable[int]) -> Any:
    """Return IDs as the bulk calls of a pool take them."""
    array = isinstance(pool.acquire_many(0), np.ndarray)
    return np.array(list(ids), np.uint64) if array else list(ids)


def unique(make: Make) -> bool:
    """An ID has one holder at a time, even if a source of random numbers repeats itself."""
    pool = make(100)
    if hasattr(pool, "draw"):
        pool.draw = _twice_each(pool.draw)
    return len({pool.acquire() for _ in range(20)}) == 20


def _twice_each(draw: Callable[..., Any]) -> Callable[..., Any]:
    kept: list[Any] = []

    def repeating(*arguments: Any) -> Any:
        if kept:
            return kept.pop()
        kept.append(draw(*arguments))
        return kept[0]

    return repeating


def reuse(make: Make) -> bool:
    """Released IDs are issued again, so a small range is enough for ever."""
    pool = make(3)
    seen = set()
    for _ in range(10):
        ids = [pool.acquire() for _ in range(3)]
        seen.update(ids)
        for cid in ids:
            pool.release(cid)
    return len(seen) == 3


def double(make: Make) -> bool:
    """The release of an ID that nobody holds is refused."""
    pool = make(64)
    cid, other = pool.acquire(), pool.acquire()
    pool.release(cid)
    wrong = (cid, FIRST + 40, FIRST + 64, FIRST - 1)
    refused = [outcome(pool.release, each) for each in wrong] == ["refused"] * len(wrong)
    return refused and outcome(pool.release, other) == "done"


def twice(make: Make) -> bool:
    """One ID twice in a bulk call is refused, and stays held."""
    pool = make(64)
    cid = pool.acquire()
    refused = outcome(pool.release_many, many(pool, [cid, cid])) == "refused"
    return refused and outcome(pool.release, cid) == "done"


def whole(make: Make) -> bool:
    """A bulk call applies whole or not at all: with a wrong ID, or with too few left."""
    pool = make(64)
    cid = pool.acquire()
    for wrong in ([cid, FIRST + 40], [FIRST + 40, cid]):
        if outcome(pool.release_many, many(pool, wrong)) != "refused":
            return False
    if outcome(pool.release, cid) != "done":
        return False
    return outcome(pool.acquire_many, 65) == "done" or len(set(pool.acquire_many(64))) == 64


def owner(make: Make) -> bool:
    """Each ID has an owner, and nobody else can release it."""
    pool = make(1000)
    cid, ids = pool.acquire(3), pool.acquire_many(5, 3)
    refused = {outcome(pool.release, cid, 4), outcome(pool.release_many, ids, 4)}
    released = {outcome(pool.release, cid, 3), outcome(pool.release_many, ids, 3)}
    return refused == {"refused"} and released == {"done"}


def cooling(make: Make) -> bool:
    """A released ID comes back at its time, not before; an owner can release all at once."""
    pool = make(64)
    ids = pool.acquire_many(64, 5, 0)
    if pool.release_owner(5, 10) != 64 or outcome(pool.acquire, 6, 9) != "full":
        return False
    again = pool.acquire_many(64, 6, 10)
    return sorted(again) == sorted(ids) and outcome(pool.release, int(ids[0]), 5) == "refused"


def bounded(make: Make) -> bool:
    """A caller that never releases does not fill the memory: the pool is full, or keeps nothing."""
    pool = make(50)
    tracemalloc.start()
    for _ in range(20_000):
        if outcome(pool.acquire) == "full":
            break
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return grown < 200_000


def every(make: Make) -> bool:
    """All IDs of the range can be held at once, whatever was released before."""
    pool = make(256)
    ids = pool.acquire_many(256)
    for cid in ids[::2]:
        pool.release(int(cid))
    return all(outcome(pool.acquire) == "done" for _ in range(128)) and (
        outcome(pool.acquire) == "full"
    )


def lowest(make: Make) -> bool:
    """The lowest free ID is issued first, which keeps the numbers small."""
    pool = make(64)
    ids = sorted(int(cid) for cid in pool.acquire_many(50))
    for at in (30, 10, 20):
        pool.release(ids[at])
    return [pool.acquire() for _ in range(4)] == [ids[10], ids[20], ids[30], FIRST + 50]


def apart(make: Make) -> bool:
    """Processes that know nothing of each other have different IDs."""
    one, other = make(1000), make(1000)
    return not {str(one.acquire()) for _ in range(20)} & {str(other.acquire()) for _ in range(20)}


def fork(make: Make) -> bool:
    """After a fork parent and child do not issue the same IDs; a child may be refused."""
    pool = make(1000)
    pool.acquire()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy has threads
        child = os.fork()
    if not child:
        failed = 1
        try:
            os.write(writer, repr([str(pool.acquire()) for _ in range(20)]).encode())
            failed = 0
        except CidError:
            failed = 0
        finally:
            os._exit(failed)
    _, status = os.waitpid(child, 0)
    assert not status, "the child failed otherwise than by a refusal"
    os.close(writer)
    with open(reader) as pipe:
        theirs = pipe.read()
    return not any(repr(str(pool.acquire())) in theirs for _ in range(20))


def threads(make: Make) -> bool:
    """Threads can share it without a lock, wherever one call interrupts another.

    A switch may come between any two bytecodes of a call; C code runs whole under the GIL. So the
    second call runs at each of these places in turn.
    """
    return all(
        _interrupted(make, start, calls)
        for start in ([], ["release"])
        for calls in (
            ["acquire", "acquire"],
            ["acquire", "release"],
            ["release", "acquire"],
            ["release", "release"],
            ["release_many", "release_many"],
        )
        if hasattr(make(4), "release") or not {"release", "release_many"} & {*start, *calls}
    )


def _interrupted(make: Make, start: list[str], calls: list[str]) -> bool:
    place = 0
    while (fine := _once(make, start, calls, place)) is True:
        place += 1
    return fine is None


def _once(make: Make, start: list[str], calls: list[str], place: int) -> bool | None:
    # Whether two calls went well, the second one at this place of the first; None at its end.
    pool = make(6)
    held = [pool.acquire() for _ in range(2)]
    if start:
        pool.release(held.pop(0))
    victim = held[0]
    done: list[bool] = []

    def one(method: str) -> None:
        ids = many(pool, [victim]) if method == "release_many" else victim
        try:
            if method == "acquire":
                held.append(pool.acquire())
            else:
                getattr(pool, method)(ids)
        except Exception:
            done.append(False)
        else:
            done.append(True)

    reached = _at(place, lambda: one(calls[0]), lambda: one(calls[1]))
    releases = sum(method != "acquire" for method in calls)
    if sum(done) != len(calls) - (releases == 2):  # only one of them can release it
        return False
    if releases:
        held.remove(victim)
    while len(held) < 6 and outcome(lambda: held.append(pool.acquire())) == "done":
        pass
    if len(set(held)) != len(held):
        return False
    return True if reached else None


def _at(place: int, call: Callable[[], None], other: Callable[[], None]) -> bool:
    # Make a call, and the other one before its bytecode number `place`; at the end if it has fewer.
    left = place

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_filename != __file__:
            left -= 1
            if left == -1:
                other()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    if left < 0:
        return True
    other()
    return False
