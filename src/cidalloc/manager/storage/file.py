"""Where a registry keeps its records: in memory, or in a file that outlives the process.

Memory sees each array whole (`_mapping`): what the file does not have yet reads as zeros.

An extent is synced to the disk before it is used. So its end is three things at once: space that no
full disk can take away, the mark above which no ID was ever issued, even if the last stores before
a power cut are lost, and where a scan of the file may stop.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import uuid
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...errors import (
    InvalidArgument,
    RegistryCorrupt,
    RegistryLocked,
    RegistryMismatch,
    Unavailable,
)
from .._sessions import Sessions
from ..settings import MAX_SESSIONS
from ._mapping import Mapping
from .file_format import (
    GRANULE,
    RECORD,
    ROW,
    Kind,
    Shape,
    Word,
    extent_word,
    extents_of,
    fill_header,
    shape_of,
)
from .file_lock import process_id, query, try_lock, unlock_and_close

__all__ = ["Storage", "TakeoverRequest", "writer_of"]

_LOCK = 0  # the byte that the writer has locked
_REQUEST = 1  # the one that a process locks which waits to be the writer
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Storage:
    """The records of a registry. `memory` or `open` makes one.

    Attributes:
        shape: the pool.
        header: the header's words; see `Word`.
        blocks, rows: memory for an `Allocator` and a `Sessions`.
        ready_blocks, ready_rows: how many records of them may be used so far; 0 is a row, too.
        path: the file, if any.
    """

    def __init__(self, shape: Shape, header: memoryview, fd: int, path: Path | None) -> None:
        self.shape = shape
        self.header = header
        self.path = path
        self._fd = fd
        self._signed = False
        self.blocks = Mapping(shape.granules * GRANULE)
        self.rows = Mapping(Sessions.size(MAX_SESSIONS))
        self._granules = {Kind.BLOCKS: 0, Kind.ROWS: 0}
        self._totals = {Kind.BLOCKS: shape.granules, Kind.ROWS: len(self.rows) // GRANULE}
        _stores.add(self)

    # ---- How one comes into being

    @classmethod
    def memory(cls, shape: Shape) -> Storage:
        """Return a store in memory alone."""
        store = cls(shape, memoryview(bytearray(Word.END * 8)).cast("Q"), -1, None)
        fill_header(store.header, shape)
        return store

    @classmethod
    def open(cls, path: Path, shape: Shape | None, *, boot: bytes, waiting_ms: int = 0) -> Storage:
        """Return the store in the file at `path`, which is made if it is not there.

        Args:
            path: the file; its folder is made, too, for this user alone.
            shape: the pool that it must have; `split` matters only if the file is made. None takes
                any, but makes no file.
            boot: the 16 bytes that tell this boot of the machine from others.
            waiting_ms: if the file is made, for how long none of its IDs may be issued.

        Raises:
            RegistryLocked: another process writes it.
            RegistryCorrupt: it is damaged, truncated, or something else.
            RegistryMismatch: it is of another pool, or of another format.
            InvalidArgument: the folder cannot be made, or the file not be used.
            Unavailable: the disk is full.
        """
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                if shape is None:
                    raise InvalidArgument(f"there is no registry at {path}") from None
                _create(path, shape, boot, waiting_ms)
                continue
            except OSError as error:
                raise _unusable(path, error) from None
            try:
                _lock(fd, path)
                if not _is_at(fd, path):
                    os.close(fd)
                    continue
                return cls._opened(fd, path, shape)
            except BaseException:
                unlock_and_close(fd, _LOCK)
                raise

    @classmethod
    def create(cls, draft: Path, shape: Shape, path: Path) -> Storage:
        """Return a new store in the new file `draft`, which is to become the one at `path`.

        It is not locked. Raises OSError.
        """
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, GRANULE)
            store = cls(shape, _header_of(fd), fd, path)
        except BaseException:
            os.close(fd)
            raise
        fill_header(store.header, shape)
        return store

    @classmethod
    def look(cls, path: Path) -> Storage:
        """Return a copy in memory of the store in a file, which is only read.

        Raises as `open`, but for `RegistryLocked`.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise InvalidArgument(f"there is no registry at {path}") from None
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            return cls._opened(fd, path, None, private=True)
        finally:
            os.close(fd)

    @classmethod
    def _opened(cls, fd: int, path: Path, wanted: Shape | None, private: bool = False) -> Storage:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"cannot use {path}: it is not a file")
        size = status.st_size
        if size < GRANULE:
            raise RegistryCorrupt(f"{path} is too short for a registry: {size} bytes")
        header = _copy_of(fd) if private else _header_of(fd)
        shape = _expect(header, path, wanted)
        store = cls(shape, header, -1 if private else fd, path)
        offset = 1
        for kind, granules in extents_of(header, path):
            if not 0 < granules <= store._room(kind):
                raise RegistryCorrupt(f"{path}: the list of extents is damaged")
            if (offset + granules) * GRANULE > size:
                raise RegistryCorrupt(
                    f"{path} is truncated: {size} bytes, and at least"
                    f" {(offset + granules) * GRANULE} were in use"
                )
            store._put(kind, granules, offset, fd if private else -1)
            offset += granules
        # The list may be behind the file, but then nothing was stored there yet. While another
        # process writes the file, it may have gone on since we read the list.
        if not (private and header[Word.PID]) and not _is_blank(fd, offset * GRANULE):
            raise RegistryCorrupt(f"{path}: records follow that its list of extents does not have")
        return store

    @staticmethod
    def expect(path: Path, shape: Shape) -> None:
        """See that the file at `path` has the pool that it must have; it is only read.

        Raises:
            RegistryCorrupt, RegistryMismatch: as `open`.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _expect(_copy_of(fd), path, shape)
        finally:
            os.close(fd)

    # ---- What it holds

    @property
    def ready_blocks(self) -> int:
        """Blocks that may be opened so far."""
        return self.shape.ready(self._granules[Kind.BLOCKS])

    @property
    def ready_rows(self) -> int:
        """Rows of sessions that may be used so far, the one that is none included."""
        return min(self._granules[Kind.ROWS] * (GRANULE // ROW), MAX_SESSIONS + 1)

    @property
    def uuid(self) -> uuid.UUID:
        """The registry's identity."""
        return uuid.UUID(bytes=self.header[Word.UUID : Word.UUID + 2].tobytes())

    @property
    def secret(self) -> bytes:
        """The key of the tokens' digests."""
        return self.header[Word.SECRET : Word.SECRET + 2].tobytes()

    @property
    def boot(self) -> bytes:
        """The boot of the machine whose clock the times are of."""
        return self.header[Word.BOOT : Word.BOOT + 2].tobytes()

    @boot.setter
    def boot(self, boot: bytes) -> None:
        # Both words must fit for the times to be believed, so it does not matter which comes first.
        self.header[Word.BOOT], self.header[Word.BOOT + 1] = struct.unpack("=QQ", boot)

    def granules(self, kind: Kind) -> int:
        """Return the length of an array so far."""
        return self._granules[kind]

    def grow(self, kind: Kind, records: int) -> None:
        """Let so many more records of a kind be used, or as many as there can be.

        Raises:
            Unavailable: the disk is full.
        """
        size = RECORD if kind is Kind.BLOCKS else ROW
        self.grow_to(kind, self._granules[kind] + (records * size) // GRANULE + 1, ahead=True)

    def grow_to(self, kind: Kind, granules: int, *, ahead: bool = False) -> None:
        """The same, until an array has so many granules; with `ahead`, a good many more."""
        while (have := self._granules[kind]) < min(granules, self._totals[kind]):
            more = granules - have
            if ahead:
                # A quarter more each time, so that the list of extents stays short.
                more = max(more, have // 4, 16 if kind is Kind.BLOCKS else 1)
            self._add(kind, min(more, self._room(kind)))

    def _room(self, kind: Kind) -> int:
        """Return how many granules the next extent can have: it has one place in memory."""
        have, upper = self._granules[kind], self.shape.upper
        limit = upper if kind is Kind.BLOCKS and have < upper else self._totals[kind]
        return limit - have

    def _add(self, kind: Kind, granules: int) -> None:
        if self.path is None:
            self._put(kind, granules, 0)
            return
        extents = extents_of(self.header, self.path)
        offset, word = 1 + sum(each for _, each in extents), Word.EXTENTS + len(extents)
        have = self._granules[kind]
        try:
            os.posix_fallocate(self._fd, offset * GRANULE, granules * GRANULE)
            os.fsync(self._fd)
            self._put(kind, granules, offset)
            self.header[word] = extent_word(len(extents), kind, granules)
            os.fsync(self._fd)
        except OSError as error:
            # Or the next one would not be where it is said to be.
            self.header[word], self._granules[kind] = 0, have
            raise Unavailable(
                f"{self.path} cannot grow by {granules * GRANULE >> 10} KiB: {error.strerror};"
                " make room on its disk"
            ) from None

    def _put(self, kind: Kind, granules: int, offset: int, fd: int = -1) -> None:
        """Put an extent where it belongs in memory; a copy of it, if it is that of another file."""
        have, length = self._granules[kind], granules * GRANULE
        mapping = self.blocks if kind is Kind.BLOCKS else self.rows
        place = self.shape.place(have) if kind is Kind.BLOCKS else have * GRANULE
        if self._fd >= 0:
            mapping.put_file(place, length, self._fd, offset * GRANULE)
        else:
            mapping.put_memory(place, length)
            if fd >= 0:
                _read(fd, memoryview(mapping)[place : place + length], offset * GRANULE)
        self._granules[kind] += granules

    def sync(self) -> None:
        """Wait until all that was stored is on the disk.

        Raises:
            Unavailable: the disk fails.
        """
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise Unavailable(f"{self.path} cannot be synced: {error.strerror}") from None

    # ---- Who writes it

    def takeover_requested_by(self) -> int:
        """Return the `process_id` of the server whose process waits to be the writer, or 0."""
        if self._fd < 0 or query(self._fd, _REQUEST):
            return 0
        return self.header[Word.REQUESTER]

    def sign(self) -> None:
        """Write down who writes the file: not before it is known to be sound."""
        if self._fd >= 0:
            self.header[Word.PID] = os.getpid()
            self.header[Word.SERVER] = process_id(os.getppid())
            self._signed = True

    def close(self) -> None:
        """Let another process write the file. Nobody may use the memory any more."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._signed:
                self.header[Word.PID] = 0
            unlock_and_close(fd, _LOCK)
        _stores.discard(self)

    def put_in_place(self, draft: Path) -> None:
        """Let the file `draft` take its place at once, also where another file is."""
        assert self.path is not None
        self.sync()
        draft.replace(self.path)
        _sync_folder(self.path.parent)


class TakeoverRequest:
    """The wish to be the writer of a file that another process writes.

    The kernel forgets it when this process dies, and whoever has the file sees it at once.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._made = False

    def make(self) -> bool:
        """Make it known; False if another process does so, and comes first."""
        if not self._made and try_lock(self._fd, _REQUEST):
            self._made = True
            word = struct.pack("=Q", process_id(os.getppid()))
            os.pwrite(self._fd, word, Word.REQUESTER * 8)
        return self._made

    def close(self) -> None:
        """Take it back."""
        unlock_and_close(self._fd, _REQUEST)


def _create(path: Path, shape: Shape, boot: bytes, waiting_ms: int) -> None:
    """Make the file, unless another process is faster; whoever looks sees all of it or nothing."""
    _make_folder(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _begin(Storage.create(draft, shape, path), boot, waiting_ms)
        with suppress(FileExistsError):
            os.link(draft, path)
        if path.is_symlink() and not path.exists():
            raise InvalidArgument(f"cannot use {path}: it is a link to a file that is not there")
        _sync_folder(path.parent)
    except OSError as error:
        raise error if isinstance(error, Unavailable) else _unusable(path, error) from None
    finally:
        draft.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.exists():
        return
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        _sync_folder(folder.parent)
    except OSError as error:
        raise InvalidArgument(
            f"cannot make the state folder {folder}: {error.strerror}; make it for the server's"
            f" user ('install -d -m 700 -o {os.geteuid()} {folder}'), or name another one"
            " ('cidalloc model -o --state FOLDER DIR')"
        ) from None


def _begin(store: Storage, boot: bytes, waiting_ms: int) -> None:
    try:
        if waiting_ms:
            # As after a power cut: whatever may have been issued cools first.
            store.header[Word.HORIZON] = waiting_ms
            store.grow_to(Kind.BLOCKS, store.shape.granules)
        else:
            store.boot = boot
        store.sync()
    finally:
        store.close()


def _expect(header: memoryview, path: Path, wanted: Shape | None) -> Shape:
    shape = shape_of(header, path)
    if wanted is not None and replace(wanted, split=shape.split) != shape:
        raise RegistryMismatch(
            f"{path} holds a pool with first={shape.first}, capacity={shape.capacity},"
            f" block={shape.block}, and not first={wanted.first}, capacity={wanted.capacity},"
            f" block={wanted.block}: change the settings back, or let it grow with"
            f" 'cidalloc registry upgrade --capacity N {path}'"
        )
    return shape


def _header_of(fd: int) -> memoryview:
    mapping = Mapping(GRANULE)
    mapping.put_file(0, GRANULE, fd, 0)
    return memoryview(mapping).cast("Q")


def _copy_of(fd: int) -> memoryview:
    header = memoryview(bytearray(Word.END * 8))
    _read(fd, header, 0)
    return header.cast("Q")


def _read(fd: int, memory: memoryview, offset: int) -> None:
    while memory and (n := os.preadv(fd, [memory], offset)):
        memory, offset = memory[n:], offset + n


def _is_blank(fd: int, offset: int) -> bool:
    """Tell whether a file has only zeros from somewhere on; where it has no data is not read."""
    while True:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # there is no more data
            return True
        data = os.pread(fd, 1 << 20, offset)
        if any(data):
            return False
        offset += len(data)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unusable(path: Path, error: OSError) -> InvalidArgument | Unavailable:
    if error.errno == errno.EROFS:
        return InvalidArgument(
            f"cannot use {path}: its file system is read-only; mount it for writing, or name a"
            " folder elsewhere ('cidalloc model -o --state FOLDER DIR')"
        )
    if error.errno in _FULL:
        return Unavailable(f"cannot make {path}: {error.strerror}; make room on its disk")
    return InvalidArgument(
        f"cannot use {path}: {error.strerror}; the server's user (uid {os.geteuid()}) must be able"
        " to read and write the file and its folder"
    )


def _is_at(fd: int, path: Path) -> bool:
    """Tell whether a file was not replaced between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path) -> None:
    if not try_lock(fd, _LOCK):
        raise RegistryLocked(
            f"process {writer_of(fd)[0]} writes {path}: a registry has one writer at a time; give"
            " each server a state folder or a model name of its own"
        )


def writer_of(file: int | Path) -> tuple[int, int]:
    """Return who writes a file: its process ID, and the `process_id` of its server."""
    if isinstance(file, Path):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return writer_of(fd)
        finally:
            os.close(fd)
    pid, server = struct.unpack("=QQ", os.pread(file, 16, Word.PID * 8))
    return pid, server


# A child must not keep a file locked that its parent has let go.
_stores: weakref.WeakSet[Storage] = weakref.WeakSet()


def _close_in_child() -> None:
    for store in _stores:
        if store._fd >= 0:
            os.close(store._fd)
            store._fd = -1


os.register_at_fork(after_in_child=_close_in_child)
