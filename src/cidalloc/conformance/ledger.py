"""The ledger of a run: what the client sent and said, and which rules of the protocol it broke.

`history.py` judges the holds and uses of IDs. The ledger judges the messages, and tells each
finding as a time line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..codes import Operation
from ..errors import CidError
from ..manager.service import Answer
from .faults import Fate
from .history import Event, Rules, check
from .recorder import Recorder

__all__ = ["ASKED", "Finding", "Ledger", "Line", "Message"]

ASKED = {
    "used too late": "A client must stop using its IDs when `ttl_ms` have passed since it *sent*"
    " its last answered request",
    "used by two": "A session owns its IDs.",
    "used too early": "`cooldown_ms` is the manager's minimum cooldown, after which the client"
    " itself may use an ended ID again.",
    "change in doubt": "If an answer is lost, send HELD with the next `seq`, and release the IDs"
    " that you do not know.",
    "released as ended": "Set `ended` only if END was sent and answered with success. Otherwise it"
    " cools for the request's `cooldown_ms`",
    "released wrongly": "Release an ID once, when no sequence uses it any more, and only with the"
    " session that holds it.",
    "request refused": "A client never causes these",
    "token used again": "After CLOSE, use a new token",
    "leaked": "At the end send CLOSE, again and again until it is answered",
    "not usable": "RENEW in the background, about every third of `ttl_ms`",
    "line protocol": "The program answers each line with one line, within ten seconds.",
    "manager": "A session owns its IDs.",
}
"""For each kind of finding, a sentence of docs/protocol.md, or of docs/conformance.md."""

_BY_LETTER = {"U": "used by two", "F": "used too early", "L": "used too late"}
_WRONG_RELEASES = ("NOT_HELD", "NOT_OWNER", "DUPLICATE", "OUT_OF_RANGE")
_REFUSALS = ("INVALID_ARGUMENT", "UNKNOWN_OPERATION", "LIMIT_EXCEEDED", "REGISTRY_MISMATCH")
_SHOWN = ("seq", "count", "ended", "cooldown_ms")
_MOST_LINES = 14


@dataclass(eq=False)
class Line:
    """A line of the time line: what happened when, with which session and IDs, and the result."""

    at: float
    text: str
    cids: set[int] = field(default_factory=set)
    token: str = ""
    result: str = ""
    fate: str = ""

    @property
    def told(self) -> str:
        """The line as text."""
        result = f" -> {self.result}" if self.result else ""
        return f"{self.text}{result}" + (f" [{self.fate}]" if self.fate else "")


@dataclass(eq=False)
class Message(Line):
    """A request of the client to the manager, and what became of it.

    Attributes:
        operation, asked, seq, ended: of the request; ``asked`` are its IDs.
        number: of the operation in the history.
        session: the generation of its session when the manager had it.
        answer: the manager's; None if it has not got the request.
    """

    operation: Operation | None = None
    asked: tuple[int, ...] = ()
    seq: int = 0
    ended: bool = False
    number: int = 0
    session: int = 0
    answer: Answer | CidError | None = None


class Finding(NamedTuple):
    """Something that the client did wrong: its kind, the words, and the time line."""

    kind: str
    words: str
    lines: list[str]


@dataclass
class _Hold:
    """An ID that the application has: of which session, and when it was used last."""

    cid: int
    holder: str
    session: int
    used_at: float = 0.0

    @property
    def who(self) -> dict[str, Any]:
        return {"cid": self.cid, "holder": self.holder, "session": self.session}


class Ledger:
    """What one run saw.

    Args:
        recorder: writes the history of the client.
        rules: the times of the run.
        unended: the cooldown without END, in seconds.
    """

    def __init__(self, recorder: Recorder, rules: Rules, unended: float) -> None:
        self.findings: list[Finding] = []
        self.lines: list[Line] = []
        self.messages = 0
        self.held: dict[int, _Hold] = {}
        self.sessions: set[int] = set()  # those that the client has an answer of
        self._recorder, self._rules, self._unended_s = recorder, rules, unended
        self._renewed_at = 0.0  # when the last answer that renewed a lease came
        self._lease: dict[int, float] = {}  # by session, until when its IDs may be used
        self._holds: list[_Hold] = []
        self._owner: dict[int, int] = {}  # by ID, the session that it was issued to
        self._unended: dict[int, int] = {}  # IDs used and released without END: by which session
        self._session: dict[str, int] = {}  # by token
        self._opened_at: dict[int, float] = {}  # by session, when its OPEN came
        self._doubt: dict[str, dict[int, str]] = {}  # by token and seq: changes without an answer
        self._settled: dict[str, int] = {}  # by token, the seq of the last HELD that was answered
        self._closed: set[str] = set()

    def note(self, now: float, text: str, cids: Iterable[int] = ()) -> Line:
        """Add a line to the time line."""
        self.lines.append(Line(now, text, set(cids)))
        return self.lines[-1]

    def find(
        self,
        kind: str,
        words: str,
        cids: Iterable[int] = (),
        token: str = "",
        until: float = float("inf"),
    ) -> None:
        """Add a finding, with the lines up to a time of these IDs and of this session."""
        wanted, any_line = set(cids), not (cids or token)
        began = self.lines[0].at if self.lines else 0.0
        shown = [
            f"{each.at - began:8.3f} s  {each.told}"
            for each in self.lines
            if each.at <= until and (any_line or wanted & each.cids or each.token == token != "")
        ]
        lines = [_printable(each) for each in shown[-_MOST_LINES:]]
        self.findings.append(Finding(kind, _printable(words), lines))

    # ---- Messages

    def received(
        self, now: float, code: int, ids: list[int], given: dict[str, Any], fate: Fate
    ) -> Message:
        """Note that a request has come from the client, and judge it."""
        operation = Operation(code) if code in list(Operation) else None
        name = operation.name if operation is not None else f"CODE={code}"
        shown = [f"{key}={json.dumps(given[key])}" for key in _SHOWN if key in given]
        message = Message(
            now,
            " ".join([name, *shown, *([_some(ids)] if ids else [])]),
            set(ids),
            token := str(given.get("session", "")),
            "did not reach the manager",
            fate.name,
            operation,
            tuple(ids),
            given["seq"] if type(given.get("seq")) is int else 0,
            given.get("ended") is True,
            self._recorder.invoke("message", operation=name),
        )
        self.messages += 1
        self.lines.append(message)
        session = self._session.get(token, 0)
        if operation is Operation.OPEN and token in self._closed:
            words = "it opened a session with the token of a session that it had closed"
            self.find("token used again", words, token=token)
        elif operation is Operation.CLOSE:
            self._closed.add(token)
            mine = [cid for cid, owner in self._owner.items() if owner == session]
            self._judge_cooldown(message, session, mine, None)
        elif operation is Operation.DELETE:
            for cid in ids:
                if cid in self.held and self.held[cid].session == session:
                    words = f"ID {cid} was released at the manager while the application had it"
                    self.find("released wrongly", words, [cid])
            self._judge_cooldown(message, session, ids, given.get("cooldown_ms"))
        if operation in (Operation.NEW, Operation.DELETE) and token:
            self._judge_seq(message)
        return message

    def _judge_seq(self, message: Message) -> None:
        doubt = self._doubt.setdefault(message.token, {})
        seq = next((each for each in doubt if each < message.seq), None)
        if seq is not None:
            words = (
                f"{message.text} was sent while the result of {doubt[seq]} was in doubt: no answer"
                " to that had come, and no HELD with a higher seq was answered since"
            )
            self.find("change in doubt", words, token=message.token)
            doubt.clear()  # it is told once
        if message.seq > self._settled.get(message.token, 0):  # else it comes too late to matter
            doubt[message.seq] = message.text

    def _judge_cooldown(
        self, message: Message, session: int, cids: Iterable[int], cooldown_ms: object
    ) -> None:
        """See that IDs of sequences without END cool for long enough."""
        short = type(cooldown_ms) is int and cooldown_ms < 1000 * self._unended_s
        for cid in cids if message.ended or short else ():
            hold = self.held.get(cid)
            in_use = hold is not None and hold.session == session and hold.used_at
            if in_use or self._unended.get(cid) == session:
                how = "ended=true" if message.ended else f"cooldown_ms={cooldown_ms}"
                name = message.text.split()[0]
                words = f"{name} released ID {cid} with {how}, but its sequence had no END"
                self.find("released as ended", words, [cid], until=message.at)
                return

    def applied(self, message: Message, answer: Answer | CidError) -> None:
        """Note what the manager did with a request, or with a copy of it."""
        operation, token = message.operation, message.token
        cids = [] if isinstance(answer, CidError) else answer[0][0].tolist()
        if operation is Operation.OPEN and cids:
            self._session[token] = cids[1]
            self._opened_at.setdefault(cids[1], message.at)
        message.session = self._session.get(token, 0)
        if message.answer is None:
            message.answer = answer
            failed = answer.code.name if isinstance(answer, CidError) else ""
            message.result = failed or _some(cids) or "nothing"
        if operation is Operation.NEW:
            self._owner.update(dict.fromkeys(cids, message.session))
            for cid in cids:
                self._unended.pop(cid, None)
        elif operation is Operation.DELETE and cids:
            for cid in message.asked:
                self._owner.pop(cid, None)
        if operation in (Operation.NEW, Operation.HELD):
            message.cids.update(cids)

    def answered(self, now: float, message: Message) -> None:
        """Note that the client gets the manager's answer now, and judge that."""
        answer, token, session = message.answer, message.token, message.session
        code = answer.code.name if isinstance(answer, CidError) else ""
        doubt = self._doubt.get(token, {})
        if message.operation is Operation.HELD and not code:
            self._settled[token] = message.seq
            for seq in [each for each in doubt if each < message.seq]:
                del doubt[seq]
        elif code == "SESSION_UNKNOWN":
            doubt.clear()
        elif not (code == "REPEATED" and message.operation is Operation.NEW):
            doubt.pop(message.seq, None)  # after REPEATED the IDs of NEW are still not known
        if session and code not in ("SESSION_UNKNOWN", "REGISTRY_MISMATCH"):
            self.sessions.add(session)
            opened = message.operation is Operation.OPEN
            first = self._opened_at[session] if opened else None
            self._recorder.done(message.number, session=session, first=first)
            until = (first or message.at) + self._rules.ttl
            self._renewed_at, self._lease[session] = now, max(until, self._lease.get(session, 0.0))
        if code in (*_WRONG_RELEASES, *_REFUSALS):
            kind = "released wrongly" if code in _WRONG_RELEASES else "request refused"
            words = f"the manager refused {message.text}: {answer}"
            self.find(kind, words, message.asked, token)

    # ---- What the program says

    def acquired(self, cids: list[int]) -> None:
        """Note that the application has got these IDs."""
        for cid in cids:
            session, before = self._owner.get(cid, 0), self.held.get(cid)
            if not session or (before is not None and before.session == session):
                how = "twice" if session else "which its session does not hold"
                self.find("used by two", f"it handed out ID {cid}, {how}", [cid])
            elif self._unended.get(cid) == session:
                words = f"it handed out ID {cid} again, after a sequence without END"
                self.find("used too early", words, [cid])
            self.held[cid] = hold = _Hold(cid, f"holder {len(self._holds) + 1}", session)
            self._holds.append(hold)
            self._recorder.note("hold", need=self._unended_s, **hold.who)

    def may_use(self, now: float, cid: int) -> bool:
        """Whether the lease of an ID is good, by the answers that have come."""
        return now < self._lease.get(self.held[cid].session, 0.0)

    def used(self, at: float, cid: int, good: bool) -> None:
        """Note that the program may use an ID, as it says.

        Args:
            at: when it was asked.
            cid: the ID.
            good: the lease was good then. Otherwise the program may have waited for an answer.
        """
        hold = self.held[cid]
        hold.used_at = at if good else max(at, self._renewed_at)
        self._recorder.note("use", now=hold.used_at, **hold.who)

    def releases(self, cid: int, ended: bool) -> None:
        """Note that the program is told to release an ID."""
        hold = self.held.pop(cid)
        if ended:
            self._recorder.note("ended", holder=hold.holder)
        elif hold.used_at:
            self._unended[cid] = hold.session

    def judge(self, events: Iterable[Event]) -> None:
        """Judge the history."""
        tokens = {session: token for token, session in self._session.items()}
        holds = {each.holder: each for each in self._holds}
        for each in check(events, self._rules):
            letter, words = each.split(": ", 1)
            cids = [int(number) for number in re.findall(r"ID (\d+)", words)]
            kind, token, until = _BY_LETTER.get(letter, "manager"), "", float("inf")
            if kind == "used too late" and (found := re.search(r"holder \d+", words)):
                hold = holds[found[0]]
                token, until = tokens.get(hold.session, ""), hold.used_at
            self.find(kind, words, cids, token, until)


def _printable(text: str) -> str:
    """Return a text without what the client may have put into it to confuse terminals and XML."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _some(numbers: Sequence[object]) -> str:
    """Return the first few of them as text."""
    return " ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")
