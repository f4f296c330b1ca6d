"""Where shards lie: a folder, or any URL that fsspec reads."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import fsspec

from lightning_mmembed.errors import UserInputError

#: Files of a folder that are kept open: M-BEIR has about 3,000 shards, and a process may often open 1,024.
MAX_OPEN_FILES = 128


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL and not a path.

    Example:
        >>> is_url("s3://bucket/shards"), is_url("data/shards")
        (True, False)
    """
    return isinstance(location, str) and ("://" in location or "::" in location)


class Place:
    """Reads files whole, or bytes at an offset.

    Args:
        location: A folder, or a URL.

    Raises:
        UserInputError: If fsspec has no reader for the URL, or the library that reads it is missing.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = location
        self._is_url = is_url(location)
        # The files read last. One that another thread reads is closed when that thread lets go of it, and not before.
        self._opened = lru_cache(MAX_OPEN_FILES)(partial(_open_file, Path(location)))
        self._filesystem: tuple[int, Any, str] | None = None
        if self._is_url:
            self._remote()

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None if there is none."""
        try:
            with self._open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read.

        Raises:
            UserInputError: If the file is missing.
        """
        try:
            return self._open(name)
        except FileNotFoundError:
            raise self._missing(name) from None

    def _open(self, name: str) -> IO[bytes]:
        if not self._is_url:
            return open(Path(self.location) / name, "rb")
        filesystem, root = self._remote()
        return io.BytesIO(filesystem.cat_file(f"{root}/{name}"))

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from an offset.

        Raises:
            UserInputError: If the file is missing, ends before that or cannot be read.
        """
        try:
            data = self._at(name, offset, size)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise UserInputError(
                f"{self.location}/{name} cannot be read at byte {offset}: {error}; see to the disk or the network, "
                "then run this again"
            ) from error
        if len(data) != size:
            raise UserInputError(
                f"{self.location}/{name} ends before byte {offset + size}; it is truncated: make the shards again"
            )
        return data

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Say what is read next, so that a local disk fetches it all at once and not one read after the other.

        A hint: it changes nothing that is read and raises nothing. A URL ignores it, and a system without
        ``posix_fadvise``.

        Args:
            ranges: File, offset and size in bytes, above 0, of each read.
        """
        if self._is_url or not hasattr(os, "posix_fadvise"):
            return
        for name, offset, size in ranges:
            with suppress(OSError):  # such as a missing file: it is named when it is read
                file = self._opened(name)
                os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _missing(self, name: str) -> UserInputError:
        return UserInputError(f"{self.location}/{name} is missing; make the shards again")

    def _at(self, name: str, offset: int, size: int) -> bytes:
        if self._is_url:
            filesystem, root = self._remote()
            data: bytes = filesystem.cat_file(f"{root}/{name}", start=offset, end=offset + size)
            return data
        # At an offset: no position to share among threads and forked workers, and no more is read than asked for.
        file = self._opened(name)
        return os.pread(file.descriptor, size, offset)

    def _remote(self) -> tuple[Any, str]:
        """The filesystem of a URL, another one in each process: they do not outlive a fork."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            try:
                filesystem, root = fsspec.core.url_to_fs(str(self.location))
            except (ImportError, ValueError) as error:
                raise UserInputError(f"shards={str(self.location)!r} cannot be read: {error}") from error
            self._filesystem = (os.getpid(), filesystem, root)
        return self._filesystem[1:]


class _OpenFile:
    """A file that is open for as long as something refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open_file(folder: Path, name: str) -> _OpenFile:
    return _OpenFile(os.open(folder / name, os.O_RDONLY))
