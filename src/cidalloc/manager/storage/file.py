"""The storage of a registry's records: memory, or a file that outlives the process.

A part of the file is on the disk before it is used. So the word of the header with its length says
three things: a full disk cannot take this space away, no ID or row beyond it was ever used (even if
the last stores before a power cut are lost), and a scan of the part may stop there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import struct
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import (
    InvalidArgument,
    RegistryCorrupt,
    RegistryLocked,
    Unavailable,
)
from ._mapping import Mapping
from .failures import FULL, explained, unusable
from .file_format import (
    GRANULE,
    HEADER_BYTES,
    MAX_CAPACITY,
    MAX_ROWS,
    ROW,
    Part,
    Shape,
    Word,
    checked,
    fill_header,
    mismatch,
    new_content,
    read_checked,
    shape_of,
)
from .file_lock import (
    REQUEST,
    WRITER,
    close,
    process_id,
    query,
    try_lock,
    unlock_and_close,
    writer_of,
)
from .folder import make_folder, sync_folder

__all__ = ["Storage", "enlarge"]

_GET_VERSION = 0x80087601  # FS_IOC_GETVERSION of linux/fs.h, where a long has 8 bytes
_AHEAD = {Part.ROWS: 1, Part.RECORDS: 16}  # granules by which a part grows at least
_MOST = 64  # granules by which it grows at most beyond what is needed: a request waits for them


class Storage:
    """The records of a registry. Use `memory`, `open` or `look` to get one.

    Attributes:
        shape: the pool.
        header: the words of the header; see `Word`.
        rows, records: memory for a `Sessions` and an `Allocator`.
        path: the file, if there is one.
        found_boot: the boot in which it was written before it was opened; zeros for a new one.
        is_full: the disk was full when a part could not grow the last time.
    """

    def __init__(self, header: memoryview, shape: Shape, fd: int, path: Path | None) -> None:
        self.header = header
        self.shape = shape
        self.path = path
        self._fd = fd
        self._file = 0
        self.is_full = False
        self._signed = False
        self.found_boot = self.boot
        with explained(path):
            if fd >= 0:
                self._file = _identity(fd)
            self.rows = Mapping(MAX_ROWS * ROW)
            self.records = Mapping(shape.granules * GRANULE)
            for part in Part:
                self._memory(part).extend(self.granules(part) * GRANULE, fd, part.place)
                self._grow_to(part, 1)  # a new one gets row 0 and record 0
        _stores.add(self)

    # ---- Making and opening

    @classmethod
    def memory(cls, shape: Shape) -> Storage:
        """Return a storage in memory alone."""
        header = memoryview(bytearray(HEADER_BYTES)).cast("Q")
        fill_header(header, shape)
        return cls(header, shape, -1, None)

    @classmethod
    def open(
        cls, path: Path, shape: Shape | None, *, boot: bytes, now: int = 0, wait_ms: int = 0
    ) -> Storage:
        """Return the storage in the file at `path`; make the file if it does not exist.

        Args:
            path: the file; its folder is made, too, for this user alone.
            shape: the pool. An existing file must fit it, see `Shape.fits`. With None any pool
                will do, and no file is made.
            boot: 16 bytes that identify this boot of the machine.
            now: the time.
            wait_ms: if the file is made: for how long no ID may be issued from now on.

        Raises:
            RegistryLocked: another process writes the file.
            RegistryCorrupt: the file is damaged, truncated, or something else.
            RegistryMismatch: the file has another pool, or another format.
            InvalidArgument: the folder cannot be made, or the file cannot be used.
            Unavailable: the disk is full, or the machine fails.
        """
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                if shape is None:
                    raise InvalidArgument(f"there is no registry at {path}") from None
                _create(path, shape, boot, now, wait_ms)
                continue
            except OSError as error:
                raise unusable(path, error) from None
            store = None
            try:
                _lock(fd, path)
                if _is_at(fd, path):
                    header, found = _check(fd, path, shape, locked=True)
                    if not read_checked(header, Word.GENERATION, Word.GENERATION):
                        sync_folder(path.parent)  # before the first ID is issued
                    store = cls(_header_of(fd), found, fd, path)
                    return store
            except OSError as error:
                raise unusable(path, error) from None
            finally:
                if store is None:
                    unlock_and_close(fd, WRITER)

    @classmethod
    def look(cls, path: Path) -> Storage:
        """Return a copy in memory of the storage in a file. The file is only read.

        Raises the same as `open`, except `RegistryLocked`.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise InvalidArgument(f"there is no registry at {path}") from None
        except OSError as error:
            raise unusable(path, error) from None
        try:
            with explained(path):
                store = cls(*_check(fd, path), -1, path)
                store._file = _identity(fd)
                for part in Part:
                    length = store.granules(part) * GRANULE
                    _read(fd, memoryview(store._memory(part))[:length], part.place)
                return store
        finally:
            close(fd)

    @staticmethod
    def expect(path: Path, shape: Shape) -> None:
        """Check that the file at `path` fits this pool. The file is only read.

        Raises:
            RegistryCorrupt, RegistryMismatch, InvalidArgument, Unavailable: as `open`.
        """
        with explained(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _check(fd, path, shape)
            finally:
                close(fd)

    # ---- Content

    @property
    def ready_ids(self) -> int:
        """IDs that may be issued so far, in the order of the allocator's numbers."""
        records = self.granules(Part.RECORDS) * GRANULE // Part.RECORDS.record
        return min(records - 1, self.shape.capacity)

    @property
    def ready_rows(self) -> int:
        """Rows that may be used so far, including row 0."""
        return self.granules(Part.ROWS) * GRANULE // ROW

    @property
    def uuid(self) -> uuid.UUID:
        """The registry's identity. A copy of a file is another registry."""
        found = self.header[Word.UUID : Word.UUID + 2].tobytes() + _packed(self.header[Word.FILE])
        if copy := self.read(Word.COPY):
            found += _packed(copy)
        return uuid.UUID(bytes=hashlib.blake2b(found, digest_size=16).digest(), version=4)

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
        # The times are believed only if both words fit, so the order of the stores does not matter.
        self.header[Word.BOOT], self.header[Word.BOOT + 1] = struct.unpack("=QQ", boot)

    @property
    def is_copy(self) -> bool:
        """Whether the file is a copy, or was restored, since it was written last."""
        return self.header[Word.FILE] not in (0, self._file)

    def disown(self, changes: int) -> None:
        """Let this file be a copy when it is opened next: its content lacks some of the changes."""
        self.header[Word.FILE] = ~self._file % 2**64 or 1
        self.write(Word.CHANGES, changes)

    def adopt(self) -> None:
        """Note that this file is written, and no longer the one that it is a copy of."""
        self.header[Word.FILE] = self._file

    def wait(self, now: int, wait_ms: int) -> None:
        """Let no ID be issued from ``now`` on, for so long."""
        self.write(Word.WAIT, wait_ms)
        self.write(Word.ISSUES_FROM, now + wait_ms)

    def read(self, word: int) -> int:
        """Return the value of a checked word of the header."""
        return read_checked(self.header, word, word)

    def write(self, word: int, value: int) -> None:
        """Store the value of a checked word of the header."""
        self.header[word] = checked(word, value)

    def granules(self, part: Part) -> int:
        """Return the length of a part so far, in granules."""
        return self.read(part)

    def grow(self, part: Part, records: int) -> None:
        """Let so many more records or rows be used, or as many as there can be.

        Raises:
            Unavailable: the disk is full.
        """
        have = self.granules(part)
        more = max(records * part.record // GRANULE + 1, min(have // 4, _MOST), _AHEAD[part])
        self._grow_to(part, min(have + more, len(self._memory(part)) // GRANULE))

    def _grow_to(self, part: Part, granules: int) -> None:
        have, before = self.granules(part), self.header[part]
        start, more = have * GRANULE, (granules - have) * GRANULE
        if more <= 0:
            return
        try:
            content = new_content(part, have, granules - have)
            if self._fd >= 0:
                os.posix_fallocate(self._fd, part.place + start, more)
                if os.pwrite(self._fd, content, part.place + start) < more:
                    raise OSError(errno.EIO, "a part of it was not written")
                os.fsync(self._fd)
            self._memory(part).extend(start + more, self._fd, part.place)
            if self._fd < 0:
                memoryview(self._memory(part))[start : start + more] = content
            self.write(part, granules)
            if self._fd >= 0:
                os.fsync(self._fd)
        except BaseException as error:
            self.header[part] = before  # what is not synced is not used
            if not isinstance(error, OSError):
                raise
            self.is_full = error.errno in FULL
            raise Unavailable(
                f"{self.path or 'the registry'} cannot grow by {more >> 10} KiB: {error.strerror}"
                + ("; make room on its disk" if self.path else "")
            ) from None

    def _memory(self, part: Part) -> Mapping:
        return self.rows if part is Part.ROWS else self.records

    def sync(self) -> None:
        """Wait until all stores are on the disk.

        Raises:
            Unavailable: the disk fails.
        """
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise Unavailable(f"{self.path} cannot be synced: {error.strerror}") from None

    # ---- The writer

    def takeover_requested_by(self) -> int:
        """Return the `process_id` of the server whose process waits to be the writer, or 0."""
        with explained(self.path):
            if self._fd < 0 or query(self._fd, REQUEST):
                return 0
        return int(self.header[Word.REQUESTER])

    def sign(self) -> None:
        """Note this process as the writer. The file must have been found sound before."""
        if self._fd >= 0:
            self.header[Word.PID] = os.getpid()
            self.header[Word.SERVER] = process_id(os.getppid())
            self._signed = True

    def close(self) -> None:
        """Let another process write the file. The memory must not be used any more."""
        if self._fd >= 0:
            try:
                if self._signed:
                    self.header[Word.PID] = 0
            except MemoryError:  # it only names the writer in errors
                pass
            unlock_and_close(self._fd, WRITER)
            self._fd = -1
        _stores.discard(self)


def enlarge(path: Path, capacity: int) -> Shape:
    """Let the pool in the file at `path` have `capacity` IDs; return its new shape.

    One word of the header changes, so the file is valid at any moment. IDs, sessions and UUID stay.
    No manager may run.

    Raises:
        RegistryLocked: a manager has the file.
        InvalidArgument: a smaller pool, or one that is too large.
        Unavailable: the disk fails.
        RegistryCorrupt, RegistryMismatch: as `Storage.open`.
    """
    store = Storage.open(path, None, boot=b"")
    try:
        first, present = store.shape.first, store.shape.capacity
        if not present <= capacity <= min(MAX_CAPACITY, 2**63 - first):
            raise InvalidArgument(
                f"a pool of {present} IDs from {first} on cannot become one of {capacity}: it only"
                " grows, to at most 2**38 IDs and to below 2**63"
            )
        store.write(Word.CAPACITY, capacity)
        store.sync()
        return shape_of(store.header, path)
    finally:
        store.close()


def _create(path: Path, shape: Shape, boot: bytes, now: int, wait_ms: int) -> None:
    """Make the file, unless another process is faster. It appears at `path` when it is complete."""
    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with explained(path):
            _fill(draft, shape, path, boot, now, wait_ms)
            with suppress(FileExistsError):
                os.link(draft, path)
            if path.is_symlink() and not path.exists():
                raise InvalidArgument(
                    f"cannot use {path}: it is a link to a file that is not there"
                )
    finally:
        with suppress(OSError):
            draft.unlink()


def _fill(draft: Path, shape: Shape, path: Path, boot: bytes, now: int, wait_ms: int) -> None:
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, GRANULE)
        header = _header_of(fd)
        fill_header(header, shape)
        store = Storage(header, shape, fd, path)
    except BaseException:
        close(fd)
        raise
    try:
        store.wait(now, wait_ms)
        store.boot = boot
        store.adopt()
        store.sync()
    finally:
        store.close()


def _check(
    fd: int, path: Path, wanted: Shape | None = None, locked: bool = False
) -> tuple[memoryview, Shape]:
    """Check that an open file is a registry, and has the wanted pool.

    Returns a copy of its header, and its pool.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"cannot use {path}: it is not a file")
    if status.st_size < GRANULE:
        raise RegistryCorrupt(f"{path} is too short for a registry: {status.st_size} bytes")
    header = memoryview(bytearray(os.pread(fd, HEADER_BYTES, 0))).cast("Q")
    shape = shape_of(header, path)
    if wanted is not None and not wanted.fits(shape):
        raise mismatch(path, shape, wanted)
    used = {part: part.place + read_checked(header, part, part) * GRANULE for part in Part}
    if status.st_size < (records := used[Part.RECORDS]):
        raise RegistryCorrupt(
            f"{path} is truncated: {status.st_size} bytes, and at least {records} were in use"
        )
    # The length of a part is stored before anything beyond it. Without the lock, a writer may store
    # both between our reads.
    ends = {Part.ROWS: Part.RECORDS.place, Part.RECORDS: status.st_size}
    if not all(_is_new(fd, part, used[part], ends[part]) for part in Part) and (
        locked or not header[Word.PID] or query(fd, WRITER)
    ):
        raise RegistryCorrupt(f"{path} is damaged: it has records beyond what it says is in use")
    return header, shape


def _identity(fd: int) -> int:
    """Return a number that no other file has, nor a later one in its place."""
    inode, version = os.fstat(fd).st_ino, bytes(8)
    with suppress(OSError):  # not all file systems have versions; ext4 soon reuses an inode
        version = fcntl.ioctl(fd, _GET_VERSION, version)
    found = hashlib.blake2b(_packed(inode) + version, digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


def _packed(word: int) -> bytes:
    return struct.pack("=Q", word)


def _header_of(fd: int) -> memoryview:
    mapping = Mapping(GRANULE)
    mapping.extend(GRANULE, fd)
    return memoryview(mapping)[:HEADER_BYTES].cast("Q")


def _read(fd: int, memory: memoryview, offset: int) -> None:
    while memory and (n := os.preadv(fd, [memory], offset)):
        memory, offset = memory[n:], offset + n


def _is_new(fd: int, part: Part, start: int, end: int) -> bool:
    """Return whether a stretch of a part has only zeros or new content. Holes are not read."""
    while True:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return True  # there is no more data
        first = (start - part.place) // GRANULE
        start = part.place + first * GRANULE
        data = os.pread(fd, min(16 * GRANULE, max(end - start, 0)), start)
        if any(data):  # it was about to grow by this
            found = np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
            new = np.frombuffer(new_content(part, first, -(-len(data) // GRANULE)), np.uint64)
            if np.any((found != 0) & (found != new[: len(found)])) or any(data[len(found) * 8 :]):
                return False
        if not data:
            return True
        start += len(data)


def _is_at(fd: int, path: Path) -> bool:
    """Tell whether a file was not replaced between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path) -> None:
    if not try_lock(fd, WRITER):
        raise RegistryLocked(
            f"process {writer_of(fd)[0]} writes {path}: a registry has one writer at a time; give"
            " each server a state folder or a model name of its own"
        )


# A child must not keep a file locked that its parent has let go.
_stores: weakref.WeakSet[Storage] = weakref.WeakSet()


def _close_in_child() -> None:
    for store in _stores:
        if store._fd >= 0:
            os.close(store._fd)
            store._fd = -1


os.register_at_fork(after_in_child=_close_in_child)
