"""The errors that calls of the system on a registry's file become."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CidError, InvalidArgument, Unavailable

__all__ = ["FULL", "explained", "is_passing", "unusable"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of the errors that a full disk gives."""
_PASSING = (
    *FULL,
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK),
    *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT),
)


def is_passing(error: OSError) -> bool:
    """Tell whether trying again may help: the machine has failed, or lacks something."""
    return error.errno in _PASSING


def unusable(path: Path | None, error: OSError) -> CidError:
    """Return the error for one of the system about the file at a path, or about memory."""
    if isinstance(error, CidError):
        return error
    what = f"cannot use {path}" if path else "cannot make a registry in memory"
    if error.errno == errno.EROFS:
        return InvalidArgument(
            f"{what}: its file system is read-only; mount it for writing, or name a folder"
            " elsewhere ('cidalloc model -o --state FOLDER DIR')"
        )
    if error.errno in FULL:
        return Unavailable(f"{what}: {error.strerror}; make room on its disk")
    if is_passing(error):
        return Unavailable(f"{what}: {error.strerror}")
    return InvalidArgument(
        f"{what}: {error.strerror}; the server's user (uid {os.geteuid()}) must be able to read and"
        " write the file and its folder"
    )


@contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """Raise `unusable` for an error of the system."""
    try:
        yield
    except OSError as error:
        raise unusable(path, error) from None
