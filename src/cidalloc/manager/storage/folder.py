"""The folder of a registry's file: what is new in a folder is on the disk when that is synced."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ...errors import InvalidArgument, Unavailable
from .failures import is_passing
from .file_lock import close

__all__ = ["make_folder", "sync_folder"]


def make_folder(folder: Path) -> None:
    """Make a folder for this user alone, and those above it; all are on the disk then."""
    try:
        if folder.exists():
            return
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                _make_one_folder(each, 0o700 if each == folder else 0o777)
    except OSError as error:
        if is_passing(error):
            raise Unavailable(f"cannot make {folder}: {error.strerror}") from None
        raise InvalidArgument(
            f"cannot make the state folder {folder}: {error.strerror}; make it for the server's"
            f" user ('install -d -m 700 -o {os.geteuid()} {folder}'), or name another one"
            " ('cidalloc model -o --state FOLDER DIR')"
        ) from None


def _make_one_folder(folder: Path, mode: int) -> None:
    folder.mkdir(mode, exist_ok=True)
    try:
        sync_folder(folder.parent)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # the next try would find it, and not sync it
        raise


def sync_folder(folder: Path) -> None:
    """Wait until what a folder lists is on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        close(fd)
