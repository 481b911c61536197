"""The checker of histories finds what breaks each rule, and nothing in a history that is good."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from cidalloc.conformance.history import Event, Rules, check, counts, gap, read

RULES = Rules(ttl=10.0, grace=2.0, cooldown=2.0)


class Story:
    """A history that is written line by line; each operation takes a tenth of a second."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._numbers = itertools.count(1)

    def __call__(self, at: float, by: str, what: str, type: str = "ok", **more: Any) -> Story:
        op = next(self._numbers)
        self.events.append({"at": at, "by": by, "op": op, "type": "invoke", "what": what, **more})
        if type != "cut off":
            code = {"code": more["code"]} if "code" in more else {}
            self.events.append({"at": at + 0.1, "by": by, "op": op, "type": type, **code})
        return self


def good() -> Story:
    """Two sessions with one ID after the other; the first dies, the second ends in order."""
    story = Story()
    story(0, "manager1", "start")
    story(1, "manager1", "open", session=1, ttl=10.0)
    story(1, "a", "message", session=1, operation="OPEN", first=1.0)
    story(2, "manager1", "issue", session=1, seq=1, cids=[7])
    story(2, "a", "message", session=1, operation="NEW")
    story(3, "a", "hold", session=1, cid=7, holder="a.1", need=6.0)
    story(3, "a", "use", session=1, cid=7, holder="a.1")
    story(11, "a", "use", session=1, cid=7, holder="a.1", type="cut off")
    story(14, "manager1", "end", session=1, why="expired", cooldown=6.0)
    story(15, "manager1", "open", session=2, ttl=10.0)
    story(20, "manager1", "issue", session=2, seq=1, cids=[7])
    story(20, "b", "message", session=2, operation="NEW")
    story(20.5, "b", "hold", session=2, cid=7, holder="b.1", need=6.0)
    story(21, "b", "use", session=2, cid=7, holder="b.1")
    story(21.2, "b", "ended", holder="b.1")
    story(23.5, "b", "hold", session=2, cid=7, holder="b.2", need=6.0)
    story(24, "manager2", "start")
    story(24.1, "manager2", "held", session=2, seq=2, cids=[7])
    story(24.2, "manager2", "release", session=2, seq=3, cids=[7], cooldown=2.0)
    return story


def test_nothing_is_wrong() -> None:
    assert check(good().events, RULES) == []
    assert counts(good().events)["use"] == 3
    assert gap(good().events) == 17.5


def after_a_power_cut() -> Story:
    """What was written last is lost; whoever used an ID then has stopped when it comes again."""
    story = good()
    story(25, "c", "message", session=2, operation="NEW")
    story(25, "c", "hold", session=2, cid=9, holder="c.1", need=6.0)
    story(25, "c", "use", session=2, cid=9, holder="c.1")
    story(26, "manager2", "power")
    story(27, "manager3", "start")
    story(27.5, "manager3", "renew", session=0, type="fail", code="SESSION_UNKNOWN")
    story(28, "manager3", "open", session=2**32, ttl=10.0)
    return story


def test_a_power_cut_breaks_no_rule_by_itself() -> None:
    story = after_a_power_cut()
    story(40, "manager3", "issue", session=2**32, seq=1, cids=[7, 9])
    story(40, "d", "message", session=2**32, operation="NEW")
    story(40.2, "d", "hold", session=2**32, cid=9, holder="d.1", need=6.0)
    assert check(story.events, RULES) == []


def test_after_a_power_cut_an_id_may_still_cool() -> None:
    story = after_a_power_cut()
    story(28.2, "d", "message", session=2**32, operation="NEW")
    story(28.5, "d", "hold", session=2**32, cid=9, holder="d.1", need=6.0)
    assert [each[0] for each in check(story.events, RULES)] == ["F"]


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("U", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "cids": [8]}),
               (26.4, "manager2", "issue", {"session": 3, "seq": 1, "cids": [8]})]),
        ("F", [(26.0, "manager2", "issue", {"session": 2, "seq": 4, "cids": [7]})]),
        ("F", [(27.0, "c", "hold", {"session": 2, "cid": 9, "holder": "c.1", "need": 6.0}),
               (27.0, "c", "use", {"session": 2, "cid": 9, "holder": "c.1"}),
               (32.0, "c", "hold", {"session": 2, "cid": 9, "holder": "c.2", "need": 6.0})]),
        ("F", [(25.4, "c", "hold", {"session": 2, "cid": 9, "holder": "c.1", "need": 6.0}),
               (25.5, "c", "use", {"session": 2, "cid": 9, "holder": "c.1"}),
               (25.6, "c", "ended", {"holder": "c.1"}),
               (27.4, "c", "hold", {"session": 2, "cid": 9, "holder": "c.2", "need": 6.0})]),
        ("U", [(24.0, "c", "hold", {"session": 2, "cid": 7, "holder": "c.1", "need": 6.0}),
               (24.5, "b", "use", {"session": 2, "cid": 7, "holder": "b.2"})]),
        ("L", [(30.3, "b", "use", {"session": 2, "cid": 7, "holder": "b.2"})]),
        ("L", [(36.0, "manager2", "end", {"session": 2, "why": "expired", "cooldown": 6.0})]),
        ("O", [(26.3, "manager2", "release", {"session": 2, "seq": 4, "cids": [7],
                                              "cooldown": 2.0})]),
        ("O", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "cids": [7]}),
               (26.4, "manager2", "release", {"session": 0, "cids": [7], "cooldown": 2.0})]),
        ("O", [(24.4, "manager2", "held", {"session": 2, "seq": 4, "cids": [7]})]),
        ("O", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "cids": [7]}),
               (26.4, "manager2", "held", {"session": 2, "seq": 5, "cids": []})]),
        ("A", [(26.3, "manager2", "issue", {"session": 2, "seq": 3, "cids": [7]})]),
        ("A", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "code": "EXHAUSTED",
                                            "type": "fail"}),
               (26.4, "manager2", "issue", {"session": 2, "seq": 4, "cids": [7]})]),
        ("U", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "cids": [8]}),
               (26.4, "manager2", "named", {"session": 3, "cids": [8]})]),
        ("U", [(26.3, "manager2", "issue", {"session": 2, "seq": 4, "cids": [8]}),
               (26.4, "triton", "end_dead", {"cids": [8]})]),
        ("F", [(13.0, "triton", "end_dead", {"cids": [7]})]),
        ("C", [(26.3, "manager2", "renew", {"session": 2, "code": "SESSION_UNKNOWN",
                                            "type": "fail"})]),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_found(rule: str, lines: list[tuple[Any, ...]]) -> None:
    story = good()
    for at, by, what, more in lines:
        story(at, by, what, **more)
    found = check(story.events, RULES)
    assert found
    assert found[0].startswith(f"{rule}: ")
    assert len(found) <= 2


def test_what_was_cut_off_may_have_happened_or_not() -> None:
    story = good()
    story(30, "manager2", "issue", session=2, seq=4, type="cut off")
    story(31, "manager3", "start")
    story(32, "manager3", "held", session=2, seq=5, cids=[12])
    story(33, "manager3", "release", session=2, seq=6, cids=[12], cooldown=2.0)
    assert check(story.events, RULES) == []


def test_one_that_expires_within_another_operation_comes_first() -> None:
    events = good().events
    number = {"by": "manager2", "op": 900}
    inner = {"by": "manager2", "op": 901}
    events += [
        {**number, "at": 40.0, "type": "invoke", "what": "renew", "session": 2},
        {**inner, "at": 40.0, "type": "invoke", "what": "end", "session": 2}
        | {"why": "expired", "cooldown": 6.0},
        {**inner, "at": 40.0, "type": "ok"},
        {**number, "at": 40.0, "type": "fail", "code": "SESSION_UNKNOWN"},
    ]
    assert check(events, RULES) == []


def test_half_a_line_is_what_a_killed_process_leaves() -> None:
    lines = [json.dumps(each) + "\n" for each in good().events]
    assert read([*lines, lines[0][:20]]) == good().events
    with pytest.raises(ValueError, match=r"Expecting|Invalid|delimiter"):
        read(["{'a': 1}\n"])
