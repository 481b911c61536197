"""The allocator next to its peers: what each does and costs, as tables for docs/choosing.md."""

from __future__ import annotations

import duties
from duties import CLAIMS
from measure import AT_ONCE
from peers import DUTIES, NUMBERS, PEERS, Numbers, Peer
from report import BULK, MAIN, SCALAR, Figure, Results, figure, markdown, number

OURS = (MAIN, "cidalloc 1")
IN_C = (MAIN, "cidalloc 8", "cidalloc 1", "malloc + free", "bump pointer")
IDIOMS = {
    "acquire + release": "`pool.release(pool.acquire())`",
    "acquire_wait + release": "`pool.release(pool.acquire_wait())`, if no call has to wait",
    "acquire, try, finally": "`cid = pool.acquire()`; `try: …`; `finally: pool.release(cid)`",
    "lease": "`with pool.lease() as cid: …`",
    "range": "`for i in range(n): …`, without any ID",
    "acquire_many, loop, release_many": "`ids = pool.acquire_many(n)`;"
    " `for cid in memoryview(ids): …`; `pool.release_many(ids)`",
    "acquire and release in a loop": "`for i in range(n): pool.release(pool.acquire())`",
    "iterate over the held IDs": "`for cid in pool: …`, n IDs are held",
    "held, loop": "`for cid in pool.held().tolist(): …`, n IDs are held",
}
"""What a user writes, for each name that measure.py has for it."""


def times(results: Results, name: str) -> Figure | None:
    """Return the time of a peer's pair divided by the allocator's, process by process."""
    found = results["cases"].get("pair", {}).get("contestants", {})
    if name not in found:
        return None
    both = zip(found[name]["ratio"], found[MAIN]["ratio"], strict=True)
    return Figure.of([peer / ours for peer, ours in both])


def memory(results: Results, name: str) -> Figure | None:
    """Return the bytes per live ID of a pool in long use."""
    return figure(results, "memory 1000000", name, "churned")


def cell(peer: type[Peer | Numbers], duty: str) -> str:
    """Say in a word whether a peer does its duty."""
    if duty in peer.by_chance:
        return "by chance"
    return "✓" if duty in peer.does else "no"


def choice(results: Results) -> str:
    """Return the table of what each peer does and costs."""
    rows = [
        [name, *("✓" if duty in CLAIMS[name] else "no" for duty in DUTIES), *_costs(results, name)]
        for name in OURS
    ]
    for title, peers in (("takes IDs back", PEERS), ("only makes numbers", NUMBERS)):
        rows.append([f"**{title}**", *[""] * (len(rows[0]) - 1)])
        for peer in sorted(peers, key=lambda each: _order(results, each.name)):
            cells = [cell(peer, duty) for duty in DUTIES]
            rows.append([peer.name, *cells, *_costs(results, peer.name)])
    head = ["", *DUTIES.values(), "time: a pair", "time: arrays", "bytes per ID"]
    return markdown(head, rows, ":---:")


def legend(_results: Results) -> str:
    """Say what each column means: what is tried."""
    return "\n".join(
        f"- *{name}*: {(getattr(duties, duty).__doc__ or '').splitlines()[0]}"
        for duty, name in DUTIES.items()
    )


def _order(results: Results, name: str) -> float:
    found = times(results, name)
    return found.middle if found else float("inf")


def _costs(results: Results, name: str) -> list[str]:
    return [
        _middle(times(results, name)),
        _middle(figure(results, BULK, name, "ratio")),
        _middle(memory(results, name)),
    ]


def _middle(found: Figure | None) -> str:
    return number(found.middle) if found else "–"


def from_c(results: Results) -> str:
    """Return the table of pairs in C."""
    rows = []
    for name in IN_C:
        cells = []
        for at_once in AT_ONCE:
            case = f"from C, {at_once} at once"
            cells += [_middle(figure(results, case, name, key)) for key in ("ns", "ratio")]
        rows.append([name, *cells])
    head = ["from C, a pair"]
    head += [f"{what}, {n:,} at once" for n in AT_ONCE for what in ("ns", f"/ {MAIN}")]
    return markdown(head, rows)


def idioms(results: Results) -> str:
    """Return the table of what users write."""
    rows, case = [], "idioms"
    for name, words in IDIOMS.items():
        case = "loops" if name == "range" else case
        rows.append(
            [words, *(_middle(figure(results, case, name, key)) for key in ("ns", "ratio"))]
        )
    return markdown(
        ["what you write; n is 1000", "ns per ID", "/ the first, or the first loop"], rows
    )


def allocator(results: Results) -> str:
    """Say in three lines what the allocator costs, and against what."""

    def ns(case: str) -> str:
        return _middle(figure(results, case, MAIN, "ns"))

    def of(case: str, name: str) -> str:
        return _middle(figure(results, case, name, "ratio"))

    def pair(*names: str) -> str:
        return ", ".join(f"{name} {_middle(times(results, name))} ×" for name in names)

    dense, used = (
        _middle(figure(results, "memory 1000000", MAIN, key)) for key in ("dense", "churned")
    )
    in_arrays = {peer.name: figure(results, BULK, peer.name, "ratio") for peer in PEERS}
    found = {name: ratio.middle for name, ratio in in_arrays.items() if ratio}
    nearest = min(found, key=lambda name: found[name], default="–")
    return (
        f"- **It costs** {ns('pair')} ns to acquire an ID and release it from Python,"
        f" {ns('from C, 1 at once')} ns from C, and {dense} to {used} bytes per held ID.\n"
        "- **Pools that do less** take a multiple of that time:"
        f" {pair('list + set', 'heapq + set', 'full Python')}. With a million held IDs list + set"
        f" takes {of(SCALAR, 'list + set')} × one by one, and {of(BULK, 'list + set')} × in arrays;"
        f" the nearest in arrays, {nearest}, takes {of(BULK, nearest)} ×.\n"
        "- **Numbers that nobody takes back** cost, next to an acquire and release:"
        f" {pair('itertools.count', 'random.getrandbits(63)', 'uuid_utils.uuid4()')},"
        f" {pair('secrets.randbits(63)', 'uuid.uuid4()')}."
    )


def costs(results: Results) -> dict[str, tuple[str, Figure, Figure | None]]:
    """Return the kind, the time and the memory of each contestant, for the picture."""
    kinds = {
        **dict.fromkeys(OURS, "cidalloc"),
        **{peer.name: "takes IDs back, does less" for peer in PEERS},
        **{peer.name: "only makes numbers, keeps none" for peer in NUMBERS},
    }
    return {
        name: (kind, time, memory(results, name))
        for name, kind in kinds.items()
        if (time := times(results, name))
    }


PARTS = (choice, legend, from_c, idioms)
