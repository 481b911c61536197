"""Mutants: this package with one promise broken in each, which the fleet must notice.

`python mutants.py` runs them all, and says which rule told.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_SPEC = importlib.util.find_spec("cidalloc")
assert _SPEC is not None and _SPEC.origin is not None
PACKAGE = Path(_SPEC.origin).parent


@dataclass(frozen=True)
class Mutant:
    """One fault: in which file, what stands there, and what in its place."""

    name: str
    file: str
    old: str
    new: str
    rules: str  # by which the simulation finds it
    seed: int = 0  # some need rare luck
    promise: str = ""
    tests: tuple[str, ...] = ()  # that find it

    @property
    def is_core(self) -> bool:
        """Whether it is in Cython, so that the package has to be compiled with it."""
        return self.file.endswith(".pxd")


def table() -> list[Mutant]:
    """Return the mutants of tests/mutants, which unit tests find."""
    found = []
    for path in sorted((_HERE.parent / "mutants").glob("*.txt")):
        promise = ""
        for entry in re.split(r"\n\n+(?=[^-+])", path.read_text().strip()):
            name, *lines = entry.splitlines()
            if name.startswith("## "):
                promise = name.removeprefix("## ")
                continue
            old, new = ("\n".join(x[1:] for x in lines if x[:1] == sign) for sign in "-+")
            file, *tests = (line for line in lines if line[:1] not in "-+")
            found.append(Mutant(name, file, old, new, "", promise=promise, tests=tuple(tests)))
    return found


_RELEASE = "self.pool.release_many(numbers, session.number, self.now + cooldown)"

MUTANTS = [
    Mutant(
        "reuse without cooldown",
        "manager/registry.py",
        _RELEASE,
        "self.pool.release_many(numbers, session.number, self.now)",
        "F",
    ),
    Mutant(
        "reuse out of the cache without cooldown",
        "client/core/id_cache.py",
        "self.cooling.append((now + self.cooldown, cid))",
        "self.cooling.append((now, cid))",
        "F",
    ),
    Mutant(
        "deadline at the reply and not at the send",
        "client/core/lease.py",
        "self._renewed(sent)",
        "self._renewed(self._link.now())",
        "L",
    ),
    Mutant(
        "expiry without grace",
        "manager/registry.py",
        "expires = self.now + session.ttl + self.settings.grace_ms",
        "expires = self.now + session.ttl",
        "L",
    ),
    Mutant(
        "expiry without the announced cooldown",
        "manager/registry.py",
        "self._end(session, self._silence(session.cooldown, bool(models)))",
        "self._end(session, self._silence(0, bool(models)))",
        "F",
    ),
    Mutant(
        "use after the lease",
        "client/core/lease.py",
        "if now >= self.deadline:\n            raise SessionExpired(self.expired())",
        "if False:\n            raise SessionExpired(self.expired())",
        "L",
    ),
    Mutant(
        "release without owner check",
        "manager/registry.py",
        _RELEASE,
        "[self.pool.release_many(numbers[n : n + 1], self.pool.owner_of(int(numbers[n])),"
        " self.now + cooldown) for n in range(len(ids))]",
        "O",
    ),
    Mutant(
        "release without a session of what a session holds",
        "manager/registry.py",
        "session = self.sessions.anonymous.get(owner)",
        "session = next(each for each in self.sessions if each.number == owner)",
        "O",
    ),
    Mutant(
        "a retried change acts twice",
        "manager/registry.py",
        "if seq <= session.seq:",
        "if False:",
        "A",
    ),
    Mutant(
        "IDs are issued in a drain",
        "manager/service.py",
        "if draining and request.operation in (Operation.OPEN, Operation.NEW):",
        "if False:",
        "D",
    ),
    Mutant(
        "an owner number is reused too early",
        "manager/registry.py",
        "return self.sessions.end(session, ",
        "return self._leave(session, ",
        "COU",
    ),
    Mutant(
        "a reopened file starts at first",
        "manager/registry.py",
        "return cls(settings, now, store, boot)",
        "store.close()\n            return cls(settings, now, None, boot)",
        "ACFU",
    ),
    Mutant(
        "no wait after a power cut",
        "manager/recovery.py",
        "floor = now + max(horizon, settings.cooldown_ms)",
        "floor = now",
        "FU",
    ),
    Mutant(
        "the time that an ID may be in use is not noted",
        "manager/registry.py",
        "self.store.write(Word.HORIZON, horizon)",
        "pass",
        "FU",
    ),
    Mutant(
        "END for the dead while Triton may know their sequences",
        "manager/registry.py",
        "since = self.now + self._silence(session.cooldown, False)",
        "since = self.now",
        "FU",
    ),
    Mutant(
        "the server takes END for the dead at any time",
        "client/core/tidy.py",
        "open_stream(receive, END_WITHIN_MS / 1000)",
        "open_stream(receive, 1000.0)",
        "FU",
        150,
    ),
    Mutant(
        "END for the dead goes to another server than DEAD",
        "client/core/tidy.py",
        'stream.send(model, request.pop("inputs"), request_id=str(self._sent), **request)',
        """if model != self._runner.model:
            within = END_WITHIN_MS / 1000
            stream = self._runner.transport.open_stream(stream._receive, within)  # type: ignore
        stream.send(model, request.pop("inputs"), request_id=str(self._sent), **request)""",
        "FU",
        55,
    ),
    Mutant(
        "the heartbeat ends after a failure",
        "client/core/session.py",
        'if self.state == "closed":\n                    return',
        "if True:\n                    return",
        "P",
    ),
    Mutant(
        "no reset of the pauses after a success",
        "client/core/session.py",
        "                tries = 0\n            except CidError",
        "            except CidError",
        "P",
    ),
    Mutant(
        "pauses without a limit",
        "client/core/link.py",
        "min(_BACK_OFF_S * 2.0 ** min(tries - 1, 10), _BACK_OFF_MOST_S, self.ttl / 8)",
        "_BACK_OFF_S * 2.0 ** min(tries - 1, 10)",
        "P",
    ),
    Mutant(
        "a call that waits is never woken",
        "client/core/session.py",
        "ask_at = min(self.now() + min(wait, _PAUSE_S[1]), until)",
        'ask_at = float("inf")',
        "P",
    ),
    Mutant(
        "calls of a client wait in no order",
        "client/core/session.py",
        "place, waiting = next(iter(self.line.items()))",
        "place, waiting = next(reversed(self.line.items()))",
        "P",
        23,
    ),
    Mutant(
        "who waits last comes first",
        "manager/waiting_list.py",
        "self.places[session] = count, until",
        "self.places = {session: (count, until), **self.places}",
        "P",
        20,
    ),
    Mutant(
        "a turn that is never given back",
        "client/core/session.py",
        "while runs(self._turn):",
        "while self._turn is not None:",
        "P",
    ),
    Mutant(
        "a lost session is never replaced",
        "client/core/session.py",
        "if self.lease.spent and not self.lease.opened:",
        "if False:",
        "P",
    ),
    Mutant(
        "clients keep unused IDs in a drain",
        "client/core/id_cache.py",
        "unwanted = self.draining and (self.fresh or self.cooling)",
        "unwanted = False",
        "P",
    ),
    Mutant(
        "a drain that is never over",
        "manager/service.py",
        "draining = is_draining(registry.store.header)",
        'draining = vars(self).get("_stuck") or is_draining(registry.store.header)\n'
        "        self._stuck = draining",
        "P",
    ),
    Mutant(
        "a manager that never hands its file over",
        "manager/takeover.py",
        "if requester and requester == self._server:",
        "if False:",
        "P",
    ),
    Mutant(
        "nothing is tidied after a failure",
        "client/core/tidy.py",
        "                failures += 1\n",
        "                return\n",
        "P",
    ),
    Mutant(
        "the IDs of sessions that expired do not come back",
        "manager/registry.py",
        "while session := self.sessions.due(self.now):",
        "while session := None:",
        "P",
    ),
]

WRONG_CLIENTS = [
    Mutant(
        "no lease deadline",
        "client/core/lease.py",
        "if now >= self.deadline:\n            raise SessionExpired(self.expired())",
        "if False:\n            raise SessionExpired(self.expired())",
        "used too late",
    ),
    Mutant(
        "a lost change is sent again with a new seq",
        "client/core/lease.py",
        "        if self.doubtful:\n            yield from self.reconcile(deadline)\n        link",
        "        link",
        "change in doubt",
    ),
    Mutant(
        "an ID without END is released as ended",
        "client/core/sequence.py",
        "unended, idle_s = not self.state.close(), plan.target.idle_s",
        "unended, idle_s = self.state.close() and False, plan.target.idle_s",
        "released as ended",
    ),
    Mutant(
        "no CLOSE",
        "client/core/lease.py",
        'yield from self._ask(Operation.CLOSE, deadline, {"ended": ended})',
        "yield from ()",
        "leaked",
    ),
    Mutant(
        "no heartbeat",
        "client/core/lease.py",
        "self.renew_at = sent + self._link.ttl * self._link.rng.uniform(0.25, 0.35)",
        "self.renew_at = sent + 1e6",
        "not usable",
    ),
]
"""Clients that `cidalloc conformance` must tell from a right one; ``rules`` is what it finds."""

# Sessions.end gives the IDs back before the number is free; here they go to somebody else first.
_LEAVE = """
    def _leave(self, session: Session, reuse_at: int) -> int:
        number = session.number
        kept = self.pool.held_by(number)
        released = self.sessions.end(session, 0)
        if len(kept):
            self.pool.acquire_many(len(kept), number, self.now + 1)
        return released
"""


def write(mutant: Mutant, folder: Path) -> None:
    """Write a copy of the package with the fault in it."""
    shutil.copytree(PACKAGE, folder / "cidalloc")
    file = folder / "cidalloc" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has not {mutant.old!r} once: bring the mutant up to date")
    text = text.replace(mutant.old, mutant.new)
    if "self._leave(" in mutant.new:
        text = text.replace("\n    def _renewed(", _LEAVE + "\n    def _renewed(")
    file.write_text(text)


def run(mutant: Mutant, runs: int, seed: int = 0) -> str:
    """Return what the fleet says of it; empty if it noticed nothing."""
    with tempfile.TemporaryDirectory() as name:
        write(mutant, Path(name))
        done = subprocess.run(
            [sys.executable, str(_HERE / "simulate.py"), str(seed), "--runs", str(runs)],
            env={**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
    if done.returncode == 0:
        return ""
    assert done.returncode == 1 and "wrong" in done.stdout, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    for each in MUTANTS:
        print(f"{each.name}: {run(each, 500, each.seed) or 'NOT NOTICED'}", flush=True)
