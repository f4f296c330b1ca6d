"""Artefacts on disk: written to a temporary name and renamed, and known by a fingerprint of what made them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from lightning_mmembed.errors import UserInputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: SQLite tells of a quota, or of a file that may not grow, in the second way.
_SQLITE_FULL = ("database or disk is full", "disk I/O error")


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file under a temporary name in the same directory, then rename it.

    Args:
        path: The file; its directory is made if needed.
        content: Text (written as UTF-8) or bytes.

    Returns:
        ``path``.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file name beside ``path``; on success it replaces ``path``, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process's number: on a disk that machines share, two processes may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building_directory(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary directory beside ``path``; on success it replaces ``path``, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    old = temporary.with_suffix(".old.tmp")
    try:
        yield temporary
        if path.exists():  # moved away whole: deleting it in place could be cut short and leave a part of it
            path.rename(old)
        temporary.rename(path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Give a temporary directory that becomes ``directory`` when all is written.

    Raises:
        UserInputError: If ``directory`` holds something, or is a file.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserInputError(f"directory={str(directory)!r} is in use; give a new or an empty one")
    with building_directory(directory) as building:
        yield building


@contextlib.contextmanager
def resumable(path: str | Path) -> Iterator[None]:
    """Turn a full disk into an error that says how to go on; for work that keeps what it has finished.

    Raises:
        UserInputError: If the disk is full.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = str(error) in _SQLITE_FULL if isinstance(error, sqlite3.Error) else error.errno in _FULL
        if not full:
            raise
        raise UserInputError(
            f"no space is left for {path} ({error}); what was finished is kept: free some space and run the same "
            "command again"
        ) from error


def locked(path: str | Path) -> FileLock:
    """A lock beside ``path``, so that of several processes one makes it and the others wait and find it made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-like values: equal values give equal fingerprints on every machine.

    Example:
        >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("a", 1) == fingerprint("a", 2)
        (True, False)
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ``None`` if there is no file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.is_file() else None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
