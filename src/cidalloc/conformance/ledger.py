"""The ledger of a run: what the client sent and said, and which rules of the protocol it broke.

`history.py` judges the holds and uses of IDs. The ledger judges the messages, and tells each
finding as a time line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..codes import Operation
from ..errors import CidError
from ..manager.service import Answer
from .faults import Fate
from .history import Event, Rules, check
from .recorder import Recorder

__all__ = ["ASKED", "Finding", "Ledger", "Message"]

ASKED = {
    "used too late": "A client must stop using its IDs when `ttl_ms` have passed since it *sent*"
    " its last answered request",
    "used by two": "A session owns its IDs.",
    "used too early": "`cooldown_ms` is the manager's minimum cooldown, after which the client"
    " itself may use an ended ID again.",
    "change in doubt": "If an answer is lost, send HELD with the next `seq`, and release the IDs"
    " that you do not know.",
    "seq used twice": "NEW and DELETE with `session` need `seq`, a positive integer that increases"
    " with each of them.",
    "released as ended": "Set `ended` only if END was sent and answered with success.",
    "cooldown too short": "Without END, set `cooldown_ms` to the idle time of your model",
    "released in use": "Release an ID once, when no sequence uses it any more, and only with the"
    " session that holds it.",
    "released twice": "Release an ID once, when no sequence uses it any more, and only with the"
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
_REFUSALS = {
    "NOT_HELD": "released twice",
    "NOT_OWNER": "released twice",
    "DUPLICATE": "released twice",
    "OUT_OF_RANGE": "released twice",
    "INVALID_ARGUMENT": "request refused",
    "UNKNOWN_OPERATION": "request refused",
    "LIMIT_EXCEEDED": "request refused",
    "REGISTRY_MISMATCH": "request refused",
}
_CHANGES = (Operation.NEW, Operation.DELETE)
_SHOWN = ("seq", "count", "ended", "cooldown_ms")
_MOST_LINES = 14


@dataclass(eq=False)
class Entry:
    """One line of the time line: what happened when, and with which session and IDs."""

    at: float
    text: str
    token: str = ""
    cids: set[int] = field(default_factory=set)

    @property
    def told(self) -> str:
        """The line's text."""
        return self.text


@dataclass(eq=False)
class Message(Entry):
    """A request of the client to the manager.

    Attributes:
        operation, seq, ended, count: of the request; ``asked`` are its IDs.
        fate: what the kit did to it, in words.
        session: the generation of its session when the manager got it; 0 if it was not known.
        answer: the manager's; None if it has not got the request.
        number: of its operation in the history.
    """

    operation: Operation | None = None
    seq: int = 0
    ended: bool = False
    count: int = 1
    asked: tuple[int, ...] = ()
    fate: str = ""
    session: int = 0
    answer: Answer | CidError | None = None
    number: int = 0

    @property
    def change(self) -> tuple[Any, ...]:
        """What a retry must have in common with the first try."""
        return self.operation, self.asked, self.count, self.ended

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.text.split()[0]

    @property
    def told(self) -> str:
        """The message, what came of it, and what the kit did to it."""
        if self.answer is None:
            result = "did not reach the manager"
        elif isinstance(self.answer, CidError):
            result = self.answer.code.name
        else:
            numbers = self.answer[0][0].tolist()
            if self.operation is Operation.OPEN:
                numbers = [f"session {numbers[1]}"]
            result = _some(numbers)
        return f"{self.text} -> {result}" + (f" [{self.fate}]" if self.fate else "")


@dataclass
class Finding:
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
        """What the history has of it."""
        return {"cid": self.cid, "holder": self.holder, "session": self.session}


class Ledger:
    """What one run saw.

    Args:
        recorder: writes the history of the client.
        rules: the times of the run; ``unended`` is the cooldown without END, in seconds.
    """

    def __init__(self, recorder: Recorder, rules: Rules, unended: float) -> None:
        self.findings: list[Finding] = []
        self.entries: list[Entry] = []
        self.messages = 0
        self.held: dict[int, _Hold] = {}
        self.answered_at = 0.0
        self.sessions: set[int] = set()  # that the client knows to be open, or to have been
        self._recorder, self._rules, self._unended = recorder, rules, unended
        self._owner: dict[int, int] = {}  # by ID, the session that it was issued to
        self._unended_ids: dict[int, int] = {}  # used, and released without END: by which session
        self._generation: dict[str, int] = {}  # by token
        self._opened_at: dict[int, float] = {}  # by session, when its OPEN came
        self._changes: dict[tuple[str, int], Message] = {}
        self._doubt: dict[str, dict[int, Message]] = {}  # by token and seq
        self._settled: dict[str, int] = {}  # by token, the seq of the last HELD that was answered
        self._closed: set[str] = set()
        self._holds: list[_Hold] = []

    def note(self, now: float, text: str, cids: Iterable[int] = ()) -> Entry:
        """Add a line to the time line."""
        entry = Entry(now, text, cids=set(cids))
        self.entries.append(entry)
        return entry

    def find(
        self,
        kind: str,
        words: str,
        cids: Iterable[int] = (),
        token: str = "",
        until: float = float("inf"),
    ) -> None:
        """Add a finding, with the lines up to a time of these IDs and of this session."""
        wanted = set(cids)
        lines = [
            each
            for each in self.entries
            if each.at <= until
            and (wanted & each.cids or each.token == token != "" or not (wanted or token))
        ]
        began = self.entries[0].at if self.entries else 0.0
        shown = [f"{each.at - began:8.3f} s  {each.told}" for each in lines[-_MOST_LINES:]]
        self.findings.append(Finding(kind, words, shown))

    # ---- Messages

    def received(
        self, now: float, operation: int, ids: list[int], given: dict[str, Any], fate: Fate
    ) -> Message:
        """Note that a request has come from the client, and judge it."""
        kind = Operation(operation) if operation in list(Operation) else None
        name = kind.name if kind is not None else f"CODE={operation}"
        shown = [f"{key}={json.dumps(given[key])}" for key in _SHOWN if key in given]
        message = Message(
            now,
            " ".join([name, *shown, *([_some(ids)] if ids else [])]),
            str(given.get("session", "")),
            set(ids),
            operation=kind,
            seq=given["seq"] if type(given.get("seq")) is int else 0,
            ended=given.get("ended") is True,
            count=given.get("count", 1),
            asked=tuple(ids),
            fate=fate.name,
            number=self._recorder.invoke("message", operation=name),
        )
        self.messages += 1
        self.entries.append(message)
        token = message.token
        if kind is Operation.OPEN and token in self._closed:
            words = "it opened a session with the token of a session that it had closed"
            self.find("token used again", words, token=token)
        elif kind is Operation.CLOSE:
            self._closed.add(token)
            mine = self._of(token)
            self._judge_ended(message, [cid for cid, one in self._owner.items() if one == mine])
        elif kind in _CHANGES and token:
            self._judge_change(message)
        if kind is Operation.DELETE:
            self._judge_release(message, given.get("cooldown_ms"))
        return message

    def _of(self, token: str) -> int:
        return self._generation.get(token, -1)

    def _judge_change(self, message: Message) -> None:
        token = message.token
        first = self._changes.setdefault((token, message.seq), message)
        if first.change != message.change:
            words = f"seq={message.seq} was used for two different changes"
            self.find("seq used twice", words, token=token)
        doubt = self._doubt.setdefault(token, {})
        other = next((each for seq, each in doubt.items() if seq < message.seq), None)
        if other is not None:
            words = (
                f"{message.name} seq={message.seq} was sent while the result of {other.name}"
                f" seq={other.seq} was in doubt: no answer to that had come, and no HELD with a"
                " higher seq was answered since"
            )
            self.find("change in doubt", words, token=token)
            doubt.clear()  # it is told once
        if message.seq > self._settled.get(token, 0):  # else it comes late, and can do nothing
            doubt[message.seq] = message

    def _judge_release(self, message: Message, cooldown_ms: object) -> None:
        session = self._of(message.token)
        for cid in message.asked:
            hold = self.held.get(cid)
            if hold is not None and hold.session == session:
                words = f"ID {cid} was released at the manager while the application had it"
                self.find("released in use", words, [cid])
        self._judge_ended(message, message.asked)
        short = type(cooldown_ms) is int and cooldown_ms < 1000 * self._unended
        unended = [cid for cid in message.asked if self._unended_ids.get(cid) == session]
        if short and unended and not message.ended:
            words = (
                f"ID {unended[0]} was released with cooldown_ms={cooldown_ms}, but its sequence had"
                f" no END, and the model knows it for {1000 * self._unended:g} ms"
            )
            self.find("cooldown too short", words, unended[:1])

    def _judge_ended(self, message: Message, cids: Iterable[int]) -> None:
        session = self._of(message.token)
        for cid in cids if message.ended else ():
            hold = self.held.get(cid)
            in_use = hold is not None and hold.session == session and hold.used_at
            if in_use or self._unended_ids.get(cid) == session:
                words = f"{message.name} released ID {cid} with ended=true: its sequence had no END"
                self.find("released as ended", words, [cid], until=message.at)
                return

    def applied(self, message: Message, answer: Answer | CidError) -> None:
        """Note what the manager did with a request, or with a copy of it."""
        message.answer = message.answer or answer
        operation, token = message.operation, message.token
        if operation is Operation.OPEN and not isinstance(answer, CidError):
            self._generation[token] = session = int(answer[0][0, 1])
            self._opened_at.setdefault(session, message.at)
        message.session = self._generation.get(token, 0)
        if isinstance(answer, CidError):
            return
        cids = answer[0][0].tolist()
        if operation is Operation.NEW:
            self._owner.update(dict.fromkeys(cids, message.session))
            for cid in cids:
                self._unended_ids.pop(cid, None)
        elif operation is Operation.DELETE:
            for cid in message.asked:
                self._owner.pop(cid, None)
        if operation in (Operation.NEW, Operation.HELD):
            message.cids.update(cids)

    def answered(self, now: float, message: Message) -> None:
        """Note that the client gets the manager's answer now, and judge that."""
        answer, token = message.answer, message.token
        assert answer is not None
        self.answered_at = now
        doubt = self._doubt.get(token, {})
        code = answer.code.name if isinstance(answer, CidError) else ""
        if message.operation is Operation.HELD and not code:
            self._settled[token] = message.seq
            for seq in [each for each in doubt if each < message.seq]:
                del doubt[seq]
        elif code == "SESSION_UNKNOWN":
            doubt.clear()
        elif not (code == "REPEATED" and message.operation is Operation.NEW):
            doubt.pop(message.seq, None)  # after REPEATED the IDs of NEW are still not known
        session = message.session
        if code not in ("SESSION_UNKNOWN", "REGISTRY_MISMATCH") and session:
            self.sessions.add(session)
            opened = message.operation is Operation.OPEN
            first = self._opened_at[session] if opened else None
            self._recorder.done(message.number, session=session, first=first)
        if code in _REFUSALS:
            words = f"the manager refused {message.text}: {answer}"
            self.find(_REFUSALS[code], words, message.asked, token)

    # ---- What the program says

    def acquired(self, cids: list[int]) -> None:
        """Note that the application has got these IDs."""
        for cid in cids:
            session, before = self._owner.get(cid, 0), self.held.get(cid)
            if not session:
                self.find("used by two", f"it handed out ID {cid}, which it does not hold", [cid])
            elif before is not None and before.session == session:
                self.find("used by two", f"it handed out ID {cid} twice", [cid])
            elif self._unended_ids.get(cid) == session:
                words = f"it handed out ID {cid} again, after a sequence without END"
                self.find("used too early", words, [cid])
            hold = _Hold(cid, f"holder {len(self._holds) + 1}", session)
            self._holds.append(hold)
            self.held[cid] = hold
            self._recorder.note("hold", need=self._unended, **hold.who)

    def used(self, began: float, cid: int) -> None:
        """Note that the program has said that it may use an ID; it was asked at ``began``."""
        hold = self.held[cid]
        # If an answer came meanwhile, the program may have waited for it.
        hold.used_at = max(began, self.answered_at)
        self._recorder.note("use", now=hold.used_at, **hold.who)

    def releases(self, cid: int, ended: bool) -> None:
        """Note that the program is told to release an ID."""
        hold = self.held.pop(cid)
        if ended:
            self._recorder.note("ended", holder=hold.holder)
        elif hold.used_at:
            self._unended_ids[cid] = hold.session

    def judge(self, events: Iterable[Event]) -> None:
        """Judge the history."""
        tokens = {session: token for token, session in self._generation.items()}
        holds = {each.holder: each for each in self._holds}
        for each in check(events, self._rules):
            letter, words = each.split(": ", 1)
            cids = [int(number) for number in re.findall(r"ID (\d+)", words)]
            hold = next((holds[one] for one in re.findall(r"holder \d+", words)), None)
            late = letter == "L" and hold is not None
            self.find(
                _BY_LETTER.get(letter, "manager"),
                words,
                cids,
                tokens.get(hold.session, "") if hold is not None and late else "",
                hold.used_at if hold is not None and late else float("inf"),
            )


def _some(numbers: Sequence[object]) -> str:
    """Return the first few of them as text."""
    return " ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")
