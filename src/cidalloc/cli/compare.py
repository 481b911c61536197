"""The rules of ``doctor`` for several servers: what only all of them together show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from .rules import Facts, Finding

__all__ = ["compare"]


class _Server(NamedTuple):
    url: str
    status: Any

    @property
    def pool(self) -> tuple[int, int]:
        return self.status["pool"]["first"], self.status["pool"]["capacity"]

    @property
    def slice(self) -> str:
        """The setting; empty if there is none, or the manager does not know slices."""
        return self.status.get("slice") or ""


def compare(seen: Sequence[Facts]) -> list[Finding]:
    """Return the findings about servers that are one, or whose pools are not disjoint."""
    servers = [_Server(each.url, each.status) for each in seen if each.status is not None]
    findings = [*_twins(servers)]
    different = [group[0] for group in _groups(servers, lambda each: each.status["registry"])]
    sharing = [*_same_slice(different), *_overlapping(different)]
    if not sharing and len(different) > 1:
        sharing = [Finding("ok", f"the pools of {len(different)} servers do not overlap")]
    findings += [*sharing, *_same_number(different)]
    if missing := len(seen) - len(servers):
        what = f"managers that did not answer: {missing}; their pools are not compared"
        findings.append(Finding("note", what))
    return findings


def _twins(servers: list[_Server]) -> Iterator[Finding]:
    for group in _several(servers, lambda each: each.status["registry"]):
        hosts = sorted({each.status.get("host", "unknown") for each in group})
        yield Finding(
            "FAIL",
            f"{_names(group)} answer with one registry, {group[0].status['registry']} (host:"
            f" {', '.join(hosts)}): they are one server, or the disk of one is a copy of the"
            " other's, and then both issue the same IDs",
            "name each server once; stop a server on a copied disk, move its file away, and start"
            " it again",
        )


def _same_slice(servers: list[_Server]) -> Iterator[Finding]:
    for group in _several(servers, lambda each: (each.slice, each.pool)):
        if part := group[0].slice:
            yield Finding(
                "FAIL",
                f"{_names(group)} have one slice, {part}: they issue the same IDs",
                "give each server a slice of its own ('cidalloc model -o --slice K/N DIR')",
            )


def _overlapping(servers: list[_Server]) -> Iterator[Finding]:
    groups: list[list[_Server]] = []
    end = 0
    for each in sorted(servers, key=lambda each: each.pool):
        first, capacity = each.pool
        if first >= end:
            groups.append([])
        groups[-1].append(each)
        end = max(end, first + capacity)
    for group in groups:
        kinds = {(each.slice, each.pool) for each in group}
        if len(kinds) > 1 or (len(group) > 1 and not group[0].slice):
            yield Finding(
                "warn",
                f"the pools of {_names(group)} overlap. This matters as soon as a proxy or a load"
                " balancer is between clients and servers, or an address moves to another server: a"
                " request that reaches the wrong server can then join a stranger's sequence",
                "give each server a slice of the pool ('cidalloc model -o --slice K/N DIR')",
            )


def _same_number(servers: list[_Server]) -> Iterator[Finding]:
    fixed = [each for each in servers if "/" in each.slice]
    for group in _several(fixed, lambda each: each.slice.partition("/")[0]):
        kinds = sorted({each.slice for each in group})
        if len(kinds) > 1:
            yield Finding(
                "warn",
                f"{_names(group)} have slices of one number, {' and '.join(kinds)}: a proxy that"
                " routes by the header cid-slice cannot tell them apart",
                "choose the same N for the slices of all servers",
            )


def _groups(servers: list[_Server], key: Callable[[_Server], Hashable]) -> list[list[_Server]]:
    groups: defaultdict[Hashable, list[_Server]] = defaultdict(list)
    for each in servers:
        groups[key(each)].append(each)
    return list(groups.values())


def _several(servers: list[_Server], key: Callable[[_Server], Hashable]) -> list[list[_Server]]:
    return [group for group in _groups(servers, key) if len(group) > 1]


def _names(group: list[_Server]) -> str:
    urls = [each.url for each in group]
    return f"{', '.join(urls[:-1])} and {urls[-1]}"
