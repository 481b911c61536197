"""Does things to registries while calls of the system or allocations fail: see failing.py.

For each failure it forks a process, which does one thing, judges the registry and its file, does
the same again without a failure, and judges once more.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_model import Facts, adopted, facts_of, judge, reopen
from failing import MEMORY, Faults
from failing_acts import OPERATIONS, Operation
from sparse import content
from stepped_child import NOW, TIMES

from cidalloc.errors import CidError

UNHARMED = 10  # so many failures in a row that harm nothing: there were no more allocations
CRASHES = ("expire with models", "name the dead")
"""In these CPython 3.11 (an iterator of a dict) and numpy 1.26 (concatenate) crash."""


@dataclass
class Outcome:
    """What came of one failure."""

    error: str = ""  # what was raised
    call: str = ""  # which call failed
    fault: str = ""
    facts: Any = None


class Trial:
    """One operation in a process of its own."""

    def __init__(self, operation: Operation, folder: Path, faults: Faults) -> None:
        self.operation = operation
        self.folder = folder
        self.path = folder / "it.cidalloc"
        self.faults = faults
        self.subject: Any = None

    def facts(self) -> Facts | None:
        """Return what the next process would find."""
        if not self.path.exists() or self.operation.damaged:
            return None
        copy = adopted(content(self.path).put(self.folder / "copy"))
        try:
            found = facts_of(copy, self.operation.shape, NOW, TIMES, self.operation.boot)
        finally:
            copy.unlink()
        assert found.first or found.holds, "no ID can be had, so nothing is judged"
        for key, session in found.sessions.items():  # each file has its own digests
            found.sessions[key] = session._replace(digest=session.digest[:1] and b"a digest")
        return found

    def whole(self) -> tuple[Facts | None, Facts | None]:
        """Return the facts before and after, without a failure."""
        self.prepare()
        before = self.facts()
        self.operation.act(self.subject)
        return before, self.facts()

    def prepare(self) -> None:
        self.subject = self.operation.prepare(self.path)

    def fail(
        self, kind: str, number: int, for_ever: bool, was: Facts | None, will: Facts | None
    ) -> Outcome:
        """Do it with a failure, and judge."""
        self.prepare()
        kept, state = leaks(self.folder), self.operation.state(self.subject)
        act, subject, caught = self.operation.act, self.subject, None
        begin = self.faults.begin(kind, number, for_ever)
        try:
            begin()
            act(subject)
        except BaseException as error:
            caught = error
        finally:
            self.faults.end()
        outcome = Outcome(type(caught).__name__ if caught else "")
        outcome.call = "memory" if kind == MEMORY and caught else self.faults.last()
        may_be_left = self.may_be_left(outcome, for_ever)
        try:
            if caught:
                if not allowed(caught, kind):
                    raise caught
                caught = None
                left_over = self.judge(was, will, kind == MEMORY and for_ever)
                assert self.operation.state(self.subject) == state
                # Without memory for a call, the interpreter itself leaks its arguments.
                if kind != MEMORY and not self.operation.partial:
                    leaked = leaks(self.folder) - kept - may_be_left
                    assert not leaked, f"leaked: {sorted(leaked.elements())}"
                if left_over:
                    will = None
                else:
                    act(subject)  # once more, and then it must work
            subject = None
            self.judge_end(will, kind, may_be_left)
        except BaseException:
            outcome.fault = traceback.format_exc()
        return outcome

    def judge(self, was: Facts | None, will: Facts | None, little_memory: bool) -> bool:
        """Judge what a failure has left.

        Returns whether a part was done, which may be if there is no memory to undo it.
        """
        if self.subject is not None:
            self.operation.check(self.subject)
        state = self.facts()
        if was is None or will is None or state is None:
            assert was is None, "the file is gone"
            assert state is None or not state.sessions, "a file that is not new"
            return False
        judge(state, was, will, {})
        if little_memory and state.holds != was.holds:
            return True
        assert self.operation.partial or state.holds == was.holds, "some was done"
        return False

    def crashed(self, was: Facts | None, will: Facts | None) -> Outcome:
        """Judge what a process has left that has crashed."""
        outcome = Outcome("crash", "memory")
        try:
            self.judge(was, will, False)
        except BaseException:
            outcome.fault = traceback.format_exc()
        return outcome

    def judge_end(self, will: Facts | None, kind: str, may_be_left: Counter[str]) -> None:
        """Judge what is left when it was done once more."""
        self.operation.check(self.subject)
        state = self.facts()
        if will is not None:
            assert state is not None, "the file is gone"
            assert summary(state) == summary(will)
        self.operation.end(self.subject)
        self.subject = None
        gc.collect()
        left = leaks(self.folder)
        assert kind == MEMORY or not left - may_be_left, f"left: {sorted(left.elements())}"
        if self.path.exists() and not self.operation.damaged:
            reopen(self.path, self.operation.shape, NOW, self.operation.boot).close()

    def may_be_left(self, outcome: Outcome, for_ever: bool) -> Counter[str]:
        """Return what is no leak: drafts that could not be removed, and a part of a mapping."""
        found: Counter[str] = Counter()
        if (outcome.call == "unlink" or for_ever) and self.path.parent.exists():
            names = os.listdir(self.path.parent)
            found.update("file " + each for each in names if each.startswith("."))
        if outcome.call == "madvise":  # the next try maps it again
            found["mapping " + str(self.path)[1:]] += 1
        return found


def allowed(error: BaseException, kind: str) -> bool:
    """Return whether an error is one that a user may see.

    The interpreter and numpy sometimes raise another error where they lack memory.
    """
    own = kind == MEMORY and isinstance(error, (SystemError, RuntimeError, TypeError))
    return own or isinstance(error, (CidError, MemoryError))


def summary(facts: Facts) -> Any:
    """Return what must come of an operation, whichever IDs it got."""
    held = Counter(facts.sessions[each].label for each in facts.holds.values())
    labels = sorted((each.label, each.ttl, each.cooldown) for each in facts.sessions.values())
    return held, labels, Counter(facts.first.values())


def leaks(folder: Path) -> Counter[str]:
    """Return the open files and mappings below a folder."""
    gc.collect()
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(each)
        except FileNotFoundError:
            continue  # of the iteration itself
        if target.startswith(str(folder)):
            found["descriptor " + target] += 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            found["mapping " + line.partition("/")[2]] += 1
    for name in os.listdir(folder):
        if name not in ("it.cidalloc", "copy", "folder"):
            found["file " + name] += 1
    return found


def in_child(do: Callable[[], Any]) -> Any:
    """Return what a forked process returns; the number of the signal that killed it as an int."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            data = pickle.dumps(do())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status <= 0, "the test itself has failed"
    return pickle.loads(data) if status == 0 else status


class Worker:
    """Answers the sweeps that are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults = Faults()
        self.faults.watch(str(folder))
        self.faults.watch("/proc/")
        self.number = 0

    def trial(self, operation: Operation) -> Trial:
        self.number += 1
        folder = self.folder / f"{self.number}"
        folder.mkdir()
        return Trial(operation, folder, self.faults)

    def sweep(self, name: str, kind: str, for_ever: bool, step: int) -> dict[str, Any]:
        operation = OPERATIONS[name]
        trial = self.trial(operation)
        facts = in_child(trial.whole)
        assert isinstance(facts, tuple), f"{name} fails without a failure"
        failed: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        faults, number, unharmed = [], 0, 0
        while unharmed < (UNHARMED if kind == MEMORY else 1):
            trial = self.trial(operation)
            outcome = in_child(lambda: trial.fail(kind, number, for_ever, *facts))  # noqa: B023
            if not isinstance(outcome, Outcome):
                if kind == MEMORY and name in CRASHES and outcome == -signal.SIGSEGV:
                    outcome = in_child(lambda: trial.crashed(*facts))  # noqa: B023
                else:
                    outcome = Outcome("killed", "", f"the process ended with {outcome}")
            unharmed = 0 if outcome.call else unharmed + 1
            failed[outcome.call] += bool(outcome.call)
            errors[outcome.error] += bool(outcome.call)
            if outcome.fault:
                what = f"{name}, {kind} {number} {outcome.call} {outcome.error}"
                faults.append(f"{what}\n{outcome.fault}")
            number += step
        return {"failed": +failed, "errors": +errors, "faults": faults}


def main() -> None:
    gc.freeze()  # so that it need not be collected again in each process
    logging.getLogger("cidalloc").addHandler(logging.NullHandler())
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        name, kind, for_ever, step = json.loads(line)
        print(json.dumps(worker.sweep(name, kind, for_ever, step)), flush=True)


if __name__ == "__main__":
    main()
