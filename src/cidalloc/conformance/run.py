"""A run: one seed, with a manager of its own behind faults, and the client's program in front."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import CidError
from ..manager.registry import Registry
from ..manager.service import Answer, Service, boottime_ms
from ..manager.settings import Settings
from . import recorder
from .faults import LOST, NO_FAULT, fate_of
from .front import IDLE_MS, Call, ConnectionCut, Front
from .history import Event, Rules
from .ledger import Finding, Ledger, Message
from .recorder import Recorder

__all__ = ["Result", "run_seeds"]

_TTL_MS = 1_000
_SETTINGS = Settings(
    capacity=2**16,
    cooldown_ms=300,
    unended_cooldown_ms=IDLE_MS,
    min_ttl_ms=_TTL_MS,
    max_ttl_ms=_TTL_MS,
    grace_ms=300,
    fresh=True,
)
_FIRST = (2**30, 2**62)  # of the pool; many languages round the higher one
_TTL_S, _GRACE_S = _TTL_MS / 1000, _SETTINGS.grace_ms / 1000
_RULES = Rules(_TTL_S, _GRACE_S, _SETTINGS.cooldown_ms / 1000, slack=0.02)
_ANSWER_S = 10.0  # for which the program may take to answer
_LOOK_S = 0.1
_WORKS_S = 6.0  # without faults the client has to work within this time
_LATE_S = 0.2  # a machine that is later than this may have cost the client its lease
_PATIENCE_S = 60.0  # with such a machine
_PIPE_S = 0.02  # a line is in the pipe by then
_PAGE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 15\r\n\r\n<h1>Sorry!</h1>"


class Result(NamedTuple):
    """What came of a seed.

    Attributes:
        seed, messages: the seed, and how many messages the client sent.
        took: seconds.
        late: seconds by which the kit itself was late at most, since the machine was busy.
        findings: what the client did wrong.
    """

    seed: int
    took: float
    late: float
    messages: int
    findings: list[Finding]


class _Broken(Exception):
    """The program does not follow the line protocol, or has ended."""


class _Program:
    """The client's program: a process that answers each line with one line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._words: deque[str] = deque(maxlen=5)  # the last of standard error

    async def ask(self, line: str) -> list[str]:
        """Send a line, and return the words of the answer: ``ok`` or ``error``, and the others.

        Raises:
            _Broken: there is no answer, or it is not one.
            OSError: the program cannot be started.
        """
        process = self._process or await self._start()
        assert process.stdin is not None and process.stdout is not None
        words: list[str] = []
        try:
            process.stdin.write(f"{line}\n".encode())
            answer = await asyncio.wait_for(process.stdout.readline(), _ANSWER_S)
            words = answer.decode(errors="replace").split()
            said = repr(" ".join(words)[:80]) if words else "an empty line, or by its end"
        except asyncio.TimeoutError:
            said = f"nothing within {_ANSWER_S:g} s"
        except (OSError, ValueError) as error:
            said = f"an error: {error}"
        if not words or words[0] not in ("ok", "error"):
            await self.end()
            raise _Broken("; ".join([f"it answered {line!r} with {said}", *self._words]))
        return words

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._reading = asyncio.create_task(self._read(self._process.stderr))
        return self._process

    async def _read(self, stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (line := await stream.readline()):
            self._words.append(line.decode(errors="replace").strip())

    def signal(self, number: int) -> None:
        """Send a signal to the program and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def end(self) -> None:
        """End it, if it runs."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
            await self._reading
            self._process = None


class _Run:
    """The manager of one seed, its faults, and what the program is told to do."""

    def __init__(self, seed: int, program: _Program, folder: str) -> None:
        self.events: list[Event] = []
        self.late = self._punctual_since = 0.0
        self.ledger = Ledger(self._recorder("client"), _RULES, IDLE_MS / 1000)
        self._manager = self._recorder("manager")
        self._seed, self._program = seed, program
        self._dice = random.Random(seed)  # noqa: S311 not for secrets
        self._settings = replace(_SETTINGS, first=_FIRST[seed % 2], state=folder)
        self._quiet = self._cut_off = False
        self._service: Service | None = None
        self._late: list[asyncio.TimerHandle] = []

    def _recorder(self, by: str) -> Recorder:
        return Recorder(by, self.events.append, _now)

    # ---- The manager

    def _noting(self) -> Service | None:
        """Return the manager, after letting this history have what it does next."""
        recorder.writer = self._manager
        return self._service

    def _open(self) -> None:
        self._noting()
        self._service = Service(self._settings)

    def _close(self) -> None:
        if self._service is not None:
            self._service.close()
            self._service = None

    async def _poll(self) -> None:
        while True:
            due = _now() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            late = _now() - due
            self.late = max(self.late, late)
            self._punctual_since = _now() if late > _LATE_S else self._punctual_since
            if (service := self._noting()) is not None:
                service.poll()

    def _apply(self, call: Call, message: Message) -> Answer | CidError | None:
        """Let the manager have a request; return None if it is not there."""
        if (service := self._noting()) is None:
            return None
        answer = service.answer(call.code, call.ids, json.dumps(call.parameters))
        self.ledger.applied(message, answer)
        return answer

    async def _manage(self, call: Call) -> Answer | CidError:
        """Answer a request of the client, or do to it what the seed says."""
        later = asyncio.get_running_loop().call_later
        fate = fate_of(self._seed, self.ledger.messages)
        fate = LOST if self._cut_off else NO_FAULT if self._quiet else fate
        code = int(call.code[0, 0]) if call.code.size == 1 else -1
        ids = [] if call.ids is None else call.ids.ravel().tolist()
        message = self.ledger.received(_now(), code, ids, call.parameters, fate)
        answer = None
        if fate.before and fate.after is None:
            self._late.append(later(fate.before, self._apply, call, message))
        elif fate.before is not None:
            await asyncio.sleep(fate.before)
            answer = self._apply(call, message)
            if fate.again is not None:
                self._late.append(later(fate.again, self._apply, call, message))
        if fate.hangs:
            await asyncio.Event().wait()
        if answer is None or fate.after is None or fate.page:
            raise ConnectionCut(_PAGE if fate.page else b"")
        await asyncio.sleep(fate.after)
        self.ledger.answered(_now(), message)
        return answer

    # ---- The program

    async def _ask(self, line: str, cids: Sequence[int] = ()) -> list[str] | None:
        """Send a line; return what follows ``ok``, or None after an error."""
        shown = self.ledger.note(_now(), line, cids)
        verdict, *words = await self._program.ask(line)
        shown.result = " ".join([verdict, *words])[:120]
        shown.cids.update(int(each) for each in words if verdict == "ok" and each.isdecimal())
        return words if verdict == "ok" else None

    async def _acquire(self, count: int) -> list[int]:
        words = await self._ask(f"acquire {count}")
        if words is None:
            return []
        if len(words) != count or not all(each.isdecimal() for each in words):
            raise _Broken(f"it answered 'acquire {count}' with 'ok {' '.join(words)[:80]}'")
        cids = [int(each) for each in words]
        self.ledger.acquired(cids)
        return cids

    async def _use(self, *cids: int) -> bool:
        may = False
        for cid in cids:
            began = _now()
            good = self.ledger.may_use(began, cid)
            may = await self._ask(f"use {cid}", [cid]) is not None
            if may:
                self.ledger.used(began, cid, good)
        return may

    async def _release(self, cid: int, ended: bool) -> None:
        self.ledger.releases(cid, ended)
        await self._ask(f"release {cid}" + " ended" * ended, [cid])

    async def play(self) -> None:
        """Let the client work under faults, then without, and close it."""
        self._open()
        polling = asyncio.create_task(self._poll())
        try:
            async with Front(self._manage) as url:
                await self._ask(f"open {url} {_TTL_MS}")
                troubles = self._dice.sample([None, self._outage, self._freeze, self._restart], 2)
                for trouble in (*troubles, None):
                    for _ in range(self._dice.randint(3, 7)):
                        await self._step()
                    if trouble is not None:
                        await self._acquire(1)
                        await trouble()
                await self._finish()
        except _Broken as error:
            self.ledger.find("line protocol", str(error))
        finally:
            polling.cancel()
            for each in self._late:
                each.cancel()
            self._close()
        self.ledger.judge(self.events)

    async def _step(self) -> None:
        dice, held = self._dice, list(self.ledger.held)
        what = dice.choices(["acquire", "use", "release", "sleep"], [3, 5, 3, 2])[0]
        if what == "acquire" or (not held and what != "sleep"):
            await self._acquire(dice.randint(1, 4))
        elif what == "use":
            await self._use(dice.choice(held))
        elif what == "release":
            await self._release(dice.choice(held), dice.random() < 0.6)
        await asyncio.sleep(dice.choice([0.0, 0.05, 0.3]))

    async def _outage(self) -> None:
        """Lose all messages for longer than a lease."""
        self.ledger.note(_now(), "(from here on all messages are lost)")
        self._cut_off = True
        await asyncio.sleep(_TTL_S * self._dice.uniform(1.05, 1.7))
        await self._use(*list(self.ledger.held)[-3:])
        self._cut_off = False
        self.ledger.note(_now(), "(the network is back)")

    async def _freeze(self) -> None:
        """Stop the program for longer than a lease; it finds a question when it goes on."""
        self.ledger.note(_now(), "(the program is stopped with SIGSTOP)")
        self._program.signal(signal.SIGSTOP)
        await asyncio.sleep(_TTL_S * self._dice.uniform(1.05, 1.7))
        self.ledger.note(_now(), "(it goes on)")
        going = asyncio.get_running_loop().call_later(_PIPE_S, self._program.signal, signal.SIGCONT)
        self._late.append(going)
        await self._use(*list(self.ledger.held)[-3:])

    async def _restart(self) -> None:
        self.ledger.note(_now(), "(the manager is restarted)")
        self._close()
        await asyncio.sleep(self._dice.choice([0.0, 0.2, 0.5]))
        self._open()

    async def _finish(self) -> None:
        """See that the client works without faults, and that it leaves nothing."""
        self.ledger.note(_now(), "(no faults any more)")
        self._quiet = True
        began = _now()
        while _now() < min(max(began, self._punctual_since) + _WORKS_S, began + _PATIENCE_S):
            cids = await self._acquire(1)
            await asyncio.sleep(_TTL_S + _GRACE_S + _LOOK_S if cids else _LOOK_S)
            if await self._use(*cids):
                break
        else:
            words = "without faults it could not acquire an ID and still use it after a lease"
            self.ledger.find("not usable", words)
        for cid in list(self.ledger.held)[::2]:
            await self._release(cid, self._dice.random() < 0.5)
        for cid in list(self.ledger.held):
            self.ledger.releases(cid, False)
        await self._ask("close")
        await asyncio.sleep(_LOOK_S)
        service = self._noting()
        assert service is not None
        registry = service._holder.registry()
        open_now = {each.generation for each in registry.sessions.named.values()}
        sessions, ids = len(open_now & self.ledger.sessions), registry.tick(boottime_ms()).active
        if sessions or ids:
            self.ledger.find("leaked", f"after 'close' {ids} IDs and {sessions} sessions are held")


def _now() -> float:
    return boottime_ms() / 1000


async def _run_seed(seed: int, program: _Program, keep: Path | None) -> Result:
    began = _now()
    with tempfile.TemporaryDirectory(prefix="cidalloc-") as folder:
        run = _Run(seed, program, folder)
        await run.play()
    ledger = run.ledger
    if ledger.findings:  # which the next seed should not suffer from
        await program.end()
    if keep is not None:
        lines = [f"{each.at:.3f}  {each.told}\n" for each in ledger.lines]
        (keep / f"{seed}.txt").write_text("".join(lines))
        (keep / f"{seed}.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in run.events))
    return Result(seed, _now() - began, run.late, ledger.messages, ledger.findings)


async def run_seeds(
    command: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    done: Callable[[Result], object],
    keep: Path | None = None,
) -> None:
    """Run seeds, several at the same time, each job with a process of its own.

    Args:
        command: the client's program and its arguments.
        seeds: which.
        jobs: how many at the same time.
        done: called with each result.
        keep: a folder for the time line and the history of each seed.

    Raises:
        OSError: the program cannot be started.
    """
    left = iter(seeds)

    async def work() -> None:
        program = _Program(command)
        try:
            for seed in left:
                done(await _run_seed(seed, program, keep))
        finally:
            await program.end()

    # What its managers log of sessions that expire is no news here.
    logging.getLogger("cidalloc.manager").addHandler(logging.NullHandler())
    with recorder.watched(Registry):
        tasks = [asyncio.create_task(work()) for _ in range(min(jobs, len(seeds)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
