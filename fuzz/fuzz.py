"""Feeds what strangers may send or a disk may hold to the code that reads it.

    python fuzz/fuzz.py TARGET [libFuzzer's options] [FOLDER with a corpus ...]

Each target takes any bytes and raises only if the code does something that it must not: an
exception that is none of ours, an answer INTERNAL, a refused file that was written to, a pool whose
audit fails. `make fuzz` runs all of them for a while.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cidalloc"]):
    import numpy as np

    from cidalloc import protocol
    from cidalloc.client.core.transport import parse_url
    from cidalloc.codes import Code, Operation
    from cidalloc.errors import CidError, RegistryCorrupt
    from cidalloc.manager.inspection import look
    from cidalloc.manager.registry import Registry
    from cidalloc.manager.service import Service
    from cidalloc.manager.settings import Settings
    from cidalloc.manager.storage.file_format import GRANULE, VALUE_BITS, Part, Word, checked
    from cidalloc.triton_model.config import settings_from

TOKENS = ["0123456789abcdef" * 2, "f" * 32, "0" * 31, "x" * 32, ""]
NAMES = [
    "session",
    "seq",
    "count",
    "ttl_ms",
    "cooldown_ms",
    "ended",
    "label",
    "registry",
    "else",
    "wait_ms",
]
DTYPES = [np.uint64, np.int64, np.int8, np.float64, np.bool_]
SMALL = Settings(first=10, capacity=130, fresh=True, cooldown_ms=5, unended_cooldown_ms=9)


class Requests:
    """A service that lives on from one input to the next, as the manager does."""

    def __init__(self) -> None:
        self.now = 0
        self.calls = 0
        self.service = Service(SMALL, lambda: self.now)

    def __call__(self, data: bytes) -> None:
        """Answer a few requests, some of them well-formed."""
        some = atheris.FuzzedDataProvider(data)
        for _ in range(some.ConsumeIntInRange(1, 5)):
            self.now += some.ConsumeIntInRange(0, 100_000)
            code = np.full(
                (1, 1),
                some.ConsumeIntInRange(-128, 127)
                if some.ConsumeBool()
                else some.PickValueInList(list(Operation)),
                np.int8,
            )
            ids = np.array(
                [[some.ConsumeIntInRange(0, 200) for _ in range(some.ConsumeIntInRange(0, 4))]],
                np.uint64,
            )
            if some.ConsumeIntInRange(0, 9) == 0:
                shape = [some.ConsumeIntInRange(0, 3) for _ in range(some.ConsumeIntInRange(0, 3))]
                ids = np.zeros(shape, some.PickValueInList(DTYPES))
            answer = self.service.answer(code, ids, parameters(some))
            if isinstance(answer, CidError):
                assert answer.code is not Code.INTERNAL, answer
                assert protocol.parse_error(protocol.error_text(answer)).code is answer.code
        self.calls += 1
        if self.calls % 64 == 0:
            self.service._holder.registry()._check()


def parameters(some: atheris.FuzzedDataProvider) -> str:
    """Return parameters, as Triton hands them over, or no JSON at all."""
    if some.ConsumeIntInRange(0, 9) == 0:
        return some.ConsumeUnicodeNoSurrogates(60)
    values: list[Callable[[], object]] = [
        lambda: some.PickValueInList(TOKENS),
        lambda: some.ConsumeIntInRange(-2, 20),
        lambda: some.ConsumeIntInRange(-(2**63), 2**63 - 1),
        some.ConsumeBool,
        lambda: some.ConsumeUnicode(20),
        lambda: some.ConsumeFloat(),
        lambda: [1],
    ]
    count = some.ConsumeIntInRange(0, 5)
    return json.dumps(
        {some.PickValueInList(NAMES): some.PickValueInList(values)() for _ in range(count)}
    )


PLACES = [0, Part.ROWS.place, Part.RECORDS.place]


class Files:
    """A registry's file, patched and cut, and then looked at and opened."""

    boot = b"this boot of it!"

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "it"
        registry = Registry.in_file(self.path, SMALL, 0, self.boot)
        for n, token in enumerate((b"a" * 16, b"b" * 16)):
            registry.open(token, 0, ttl_ms=60_000, label=f"number {n}")
            registry.acquire(7 + n, 0, token=token, seq=1)
        registry.release(np.array([10, 12], np.uint64), 0, token=b"a" * 16, seq=2)
        registry.acquire(3, 0)
        registry.close()
        self.size = self.path.stat().st_size
        self.sound = self.read()

    def read(self) -> dict[int, bytes]:
        """Return what is in use of each part of the file; between them are holes."""
        with self.path.open("rb") as file:
            return {place: os.pread(file.fileno(), GRANULE, place) for place in PLACES}

    def write(self, content: dict[int, bytearray], size: int) -> None:
        """Let the file have this content, up to a length."""
        with self.path.open("r+b") as file:
            file.truncate(0)
            for place, part in content.items():
                os.pwrite(file.fileno(), part, place)
            file.truncate(size)

    def __call__(self, data: bytes) -> None:
        """Patch, then open it as this boot and as another, if it is not refused."""
        some = atheris.FuzzedDataProvider(data)
        content = {place: bytearray(part) for place, part in self.sound.items()}
        for _ in range(some.ConsumeIntInRange(0, 8)):
            place, at = some.PickValueInList(PLACES), some.ConsumeIntInRange(0, 4096)
            patch = some.ConsumeBytes(some.ConsumeIntInRange(0, 16))
            kind = some.ConsumeIntInRange(0, 2)
            if kind:
                word = some.ConsumeIntInRange(0, 2**64 - 1)
                if kind == 2:  # one that is not taken for damage
                    at -= at % 8
                    word = checked((place + at) // 8, word % 2**VALUE_BITS)
                patch = struct.pack("=Q", word)
            content[place][at : at + len(patch)] = patch
        cut = some.ConsumeIntInRange(0, 3) == 0
        size = some.ConsumeIntInRange(0, self.size) if cut else self.size
        boot = self.boot if some.ConsumeBool() else b"another boot of i"[:16]
        self.write(content, size)
        before = self.read()
        for call in (
            lambda: look(self.path, 0, boot),
            lambda: Registry.in_file(self.path, SMALL, 0, boot),
        ):
            try:
                registry = call()
            except CidError:
                after = self.read()
                for each in (after, before):  # the writer notes itself
                    each[0] = each[0][: Word.PID * 8] + each[0][Word.REQUESTER * 8 :]
                assert after == before, "a file that was refused was written to"
                return
            registry._check()
        held = {
            int(cid) for each in registry.sessions for cid in registry.pool.held_by(each.number)
        }
        try:
            while True:
                cid = int(registry.acquire(1, 0)[0])
                assert cid not in held, "issued twice"
                held.add(cid)
        except CidError as error:
            assert not isinstance(error, RegistryCorrupt)
        registry._check()
        registry.close()


def url(data: bytes) -> None:
    """Read a URL, and the words of an error."""
    text = data.decode("utf-8", "surrogateescape")
    protocol.parse_error(text)
    try:
        address = parse_url(text)
        assert address.kind in ("grpc", "http") and address.target
    except CidError as error:
        assert error.code is Code.INVALID_ARGUMENT


def config(data: bytes) -> None:
    """Read the configuration that Triton hands to the model."""
    some = atheris.FuzzedDataProvider(data)
    names = [*Settings.__slots__, "stat", "EXECUTION_ENV_PATH", ""]
    texts: list[Callable[[], str]] = [
        lambda: str(some.ConsumeIntInRange(-(2**64), 2**64)),
        lambda: some.ConsumeUnicode(20),
        lambda: some.PickValueInList(["true", "false", "/x", "1e3", "0x10", " 5 ", "1_0", "٣"]),
    ]
    found = {
        some.PickValueInList(names): {"string_value": some.PickValueInList(texts)()}
        for _ in range(some.ConsumeIntInRange(0, 6))
    }
    try:
        settings_from({"max_batch_size": some.ConsumeIntInRange(0, 4), "parameters": found})
    except CidError as error:
        assert error.code is Code.INVALID_ARGUMENT


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "requests": Requests,
    "files": Files,
    "url": lambda: url,
    "config": lambda: config,
}


def main() -> None:
    """Run one target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [options] [corpus ...]")
    target = TARGETS[sys.argv.pop(1)]()
    logging.disable(logging.CRITICAL)
    os.umask(0o077)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
