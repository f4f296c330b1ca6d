"""What is said of a full disk, and what is not taken for one."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import replacing, resumable


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_by_what_was_to_be_written(code: int) -> None:
    said = r"no space is left for out/shards \(.*hidden.*\); .* run the same command again"
    with pytest.raises(UserInputError, match=said), resumable("out/shards"):
        raise OSError(code, os.strerror(code), "hidden")


def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "catalog.sqlite")
    database.execute("CREATE TABLE texts (text TEXT)")
    database.execute("PRAGMA max_page_count = 3")
    said = r"no space is left for out/shards \(database or disk is full\)"
    with pytest.raises(UserInputError, match=said), resumable("out/shards"):
        database.execute("INSERT INTO texts VALUES (?)", ("x" * 100_000,))
    database.close()


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), sqlite3.OperationalError("no such table: a table that is full")]
)
def test_another_error_is_not_a_full_disk(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, resumable("out/shards"):
        raise error
    assert caught.value is error


def test_two_that_write_the_same_file_at_once_do_not_write_to_one_temporary_file(tmp_path: Path) -> None:
    # One process stands for two of the same number on machines that share the disk.
    with replacing(tmp_path / "file") as first:
        first.write_text("first")
        with replacing(tmp_path / "file") as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
