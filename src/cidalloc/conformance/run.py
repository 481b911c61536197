"""A run: one seed, with a manager of its own behind faults, and the client's program in front."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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

__all__ = ["TTL_MS", "Result", "run_seeds"]

TTL_MS = 1_000
"""The TTL that the program is told to ask for."""

_SETTINGS = Settings(
    capacity=2**16,
    cooldown_ms=300,
    unended_cooldown_ms=IDLE_MS,
    min_ttl_ms=TTL_MS,
    max_ttl_ms=TTL_MS,
    grace_ms=300,
    fresh=True,
)
_FIRST = (2**30, 2**62)  # of the pool; many languages lose digits of the higher one
_LEASE_S = (TTL_MS + _SETTINGS.grace_ms) / 1000
_RULES = Rules(TTL_MS / 1000, _SETTINGS.grace_ms / 1000, _SETTINGS.cooldown_ms / 1000, slack=0.02)
_ANSWER_S = 10.0  # for which the program may take to answer
_LOOK_S = 0.1
_PIPE_S = 0.02  # a line is in the pipe by then
_PAGE = (
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 25\r\n"
    b"Connection: close\r\n\r\n<html>Bad Gateway</html>\r\n"[:-1]
)


def _now() -> float:
    return boottime_ms() / 1000


class Result(NamedTuple):
    """What came of a seed: seconds, messages of the client, and what it did wrong."""

    seed: int
    took: float
    messages: int
    findings: list[Finding]


class Broken(Exception):
    """The program does not follow the line protocol, or has ended."""


class Program:
    """The client's program: a process that answers each line with one line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._words: deque[str] = deque(maxlen=5)  # what it wrote to standard error

    async def ask(self, line: str) -> list[str]:
        """Send a line, and return the words of the answer: ``ok`` or ``error``, and the others.

        Raises:
            Broken: there is no answer, or it is not one.
            OSError: the program cannot be started.
        """
        process = self._process or await self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{line}\n".encode())
            await process.stdin.drain()
            answer = await asyncio.wait_for(process.stdout.readline(), _ANSWER_S)
        except asyncio.TimeoutError:
            self._fail(f"it did not answer {line!r} within {_ANSWER_S:g} s")
        except (OSError, ValueError):
            answer = b""
        words = answer.decode(errors="replace").split()
        if not words:
            self._fail(f"it ended, or wrote an empty line, instead of answering {line!r}")
        if words[0] not in ("ok", "error"):
            self._fail(f"it answered {line!r} with {' '.join(words)[:80]!r}")
        return words

    def _fail(self, why: str) -> NoReturn:
        raise Broken("; ".join([why, *self._words]))

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._reading = asyncio.create_task(self._read(process.stderr))
        return process

    async def _read(self, stream: Any) -> None:
        while line := await stream.readline():
            self._words.append(line.decode(errors="replace").strip())

    def signal(self, number: int) -> None:
        """Send a signal to the program and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def end(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            await self._process.wait()
            await self._reading
            self._process = None


class Run:
    """The manager of one seed, its faults, and what the program is told to do.

    Args:
        seed: decides about everything.
        program: the client.
        folder: for the registry's file.
    """

    def __init__(self, seed: int, program: Program, folder: Path) -> None:
        self.events: list[Event] = []
        self._seed, self._program = seed, program
        self._dice = random.Random(seed)  # noqa: S311 not for secrets
        self._settings = replace(_SETTINGS, first=_FIRST[seed % 2], state=str(folder))
        self._manager = Recorder("manager", self.events.append, _now)
        client = Recorder("client", self.events.append, _now)
        self.ledger = Ledger(client, _RULES, IDLE_MS / 1000)
        self._quiet = False
        self._cut_off = False
        self._service: Service | None = None
        self._late: set[asyncio.TimerHandle] = set()

    # ---- The manager

    def _noting(self) -> Service | None:
        """Let the history have what is done next to this manager."""
        recorder.writer, recorder.booted = self._manager, 0.0
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
            if (service := self._noting()) is not None:
                service.poll()
            await asyncio.sleep(_LOOK_S)

    def _apply(self, call: Call, message: Message) -> Answer | CidError:
        service = self._noting()
        if service is None:
            raise ConnectionCut
        answer = service.answer(call.code, call.ids, json.dumps(call.parameters))
        self.ledger.applied(message, answer)
        return answer

    def _apply_later(self, call: Call, message: Message, seconds: float) -> None:
        def apply() -> None:
            with suppress(ConnectionCut):
                self._apply(call, message)

        self._late.add(asyncio.get_running_loop().call_later(seconds, apply))

    async def _manage(self, call: Call) -> Answer | CidError:
        """Answer a request of the client, or do to it what the seed says."""
        number = self.ledger.messages
        fate = LOST if self._cut_off else NO_FAULT if self._quiet else fate_of(self._seed, number)
        code = int(call.code[0, 0]) if call.code.size == 1 else -1
        ids = [] if call.ids is None else call.ids.ravel().tolist()
        message = self.ledger.received(_now(), code, ids, call.parameters, fate)
        if fate.hangs and fate.before is None:
            await asyncio.Event().wait()
        if fate.before is None:
            raise ConnectionCut
        if fate.before and fate.after is None:
            self._apply_later(call, message, fate.before)
            raise ConnectionCut
        await asyncio.sleep(fate.before)
        answer = self._apply(call, message)
        if fate.again is not None:
            self._apply_later(call, message, fate.again)
        if fate.hangs:
            await asyncio.Event().wait()
        if fate.after is None or fate.page:
            raise ConnectionCut(_PAGE if fate.page else b"")
        await asyncio.sleep(fate.after)
        self.ledger.answered(_now(), message)
        return answer

    # ---- The program

    async def _ask(self, line: str, cids: Sequence[int] = ()) -> list[str] | None:
        """Send a line; return what follows ``ok``, or None after an error."""
        entry = self.ledger.note(_now(), line, cids)
        verdict, *words = await self._program.ask(line)
        entry.text = f"{line} -> {verdict} {' '.join(words)}"[:160].rstrip()
        return words if verdict == "ok" else None

    async def _acquire(self, count: int) -> list[int]:
        words = await self._ask(f"acquire {count}")
        if words is None:
            return []
        if len(words) != count or not all(each.isdecimal() for each in words):
            raise Broken(f"it answered 'acquire {count}' with {' '.join(words)[:80]!r}")
        cids = [int(each) for each in words]
        self.ledger.entries[-1].cids.update(cids)
        self.ledger.acquired(cids)
        return cids

    async def _use(self, cid: int) -> bool:
        began = _now()
        may = await self._ask(f"use {cid}", [cid]) is not None
        if may:
            self.ledger.used(began, cid)
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
                if await self._ask(f"open {url} {TTL_MS}") is None:
                    raise Broken("it answered 'open' with an error")
                troubles = [None, self._outage, self._freeze, self._restart]
                for trouble in self._dice.sample(troubles, 2):
                    for _ in range(self._dice.randint(3, 7)):
                        await self._step()
                    if trouble is not None:
                        await self._acquire(1)
                        await trouble()
                for _ in range(3):
                    await self._step()
                self._quiet = True
                await self._end()
        except Broken as error:
            self.ledger.find("line protocol", str(error))
            await self._program.end()
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
        await asyncio.sleep(TTL_MS / 1000 * self._dice.uniform(1.05, 1.7))
        for cid in list(self.ledger.held)[-3:]:
            await self._use(cid)
        self._cut_off = False
        self.ledger.note(_now(), "(the network is back)")

    async def _freeze(self) -> None:
        """Stop the program for longer than a lease, with a question in its input."""
        self.ledger.note(_now(), "(the program is stopped with SIGSTOP)")
        self._program.signal(signal.SIGSTOP)
        await asyncio.sleep(TTL_MS / 1000 * self._dice.uniform(1.05, 1.7))
        self.ledger.note(_now(), "(it goes on)")
        asyncio.get_running_loop().call_later(_PIPE_S, self._program.signal, signal.SIGCONT)
        for cid in list(self.ledger.held)[-3:]:
            await self._use(cid)

    async def _restart(self) -> None:
        """Restart the manager."""
        self.ledger.note(_now(), "(the manager is restarted)")
        self._close()
        await asyncio.sleep(self._dice.choice([0.0, 0.2, 0.5]))
        self._open()

    async def _end(self) -> None:
        """See that the client works without faults, and that it leaves nothing."""
        self.ledger.note(_now(), "(no faults any more)")
        for _ in range(3):
            for _ in range(20):
                if cids := await self._acquire(1):
                    break
                await asyncio.sleep(0.25)
            await asyncio.sleep(_LEASE_S + _LOOK_S)
            if cids and await self._use(cids[0]):
                break
        else:
            words = "without faults it could not acquire an ID and still use it after a lease"
            self.ledger.find("not usable", words)
        for cid in list(self.ledger.held)[::2]:
            await self._release(cid, self._dice.random() < 0.5)
        for cid in list(self.ledger.held):
            self.ledger.releases(cid, False)
        await self._ask("close")
        for _ in range(5):
            if not (left := self._left()):
                return
            await asyncio.sleep(_LOOK_S)
        self.ledger.find("leaked", left)

    def _left(self) -> str:
        """Return what the manager still has of the client; empty if it is nothing."""
        service = self._noting()
        assert service is not None
        registry = service._holder.registry()
        registry.tick(boottime_ms())
        open_now = {each.generation for each in registry.sessions.named.values()}
        sessions = open_now & self.ledger.sessions
        if not (registry.pool.active or sessions):
            return ""
        return f"after 'close' {registry.pool.active} IDs and {len(sessions)} sessions are held"


async def run_seed(seed: int, program: Program, keep: Path | None = None) -> Ledger:
    """Run one seed and return what was found.

    Args:
        seed: what happens.
        program: the client, which may have run other seeds before.
        keep: a folder for the history and the time line.
    """
    with tempfile.TemporaryDirectory(prefix="cidalloc-") as folder:
        run = Run(seed, program, Path(folder))
        await run.play()
    if keep is not None:
        lines = [f"{each.at:.3f}  {each.told}\n" for each in run.ledger.entries]
        (keep / f"{seed}.txt").write_text("".join(lines))
        (keep / f"{seed}.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in run.events))
    return run.ledger


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
        keep: see `run_seed`.

    Raises:
        OSError: the program cannot be started.
    """
    left = iter(seeds)

    async def work() -> None:
        program = Program(command)
        try:
            for seed in left:
                began = time.monotonic()
                ledger = await run_seed(seed, program, keep)
                if ledger.findings:  # which the next seed should not suffer from
                    await program.end()
                took = time.monotonic() - began
                done(Result(seed, took, ledger.messages, ledger.findings))
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
