"""What a conversion reads of a source, whatever its layout: records, and lines that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, Task


@dataclass(frozen=True)
class CandidateRecord:
    """A line of a candidate pool; ``image`` is a path relative to the source, or None.

    ``source_id`` is what the source calls it, where that is no ``did``.
    """

    did: str
    text: str
    image: str | None
    modality: Modality
    source_id: str = ""


@dataclass(frozen=True)
class QueryRecord:
    """A line of a query file; ``image`` is a path relative to the source, or None.

    ``source_id`` is what the source calls it, where that is no ``qid``; ``grades`` how relevant each positive is, where
    that is told; ``ignored`` the candidates that its rankings leave out; ``split`` its own, where a file holds several.
    """

    qid: str
    text: str
    image: str | None
    modality: Modality
    task: Task
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source_id: str = ""
    grades: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()
    split: str | None = None


@dataclass(frozen=True)
class Noted:
    """How many of something a source holds that is used in no record, and is no defect either."""

    what: str
    number: int


@dataclass(frozen=True)
class BadRecord:
    """A line that cannot be used, and why."""

    where: str
    reason: str


class Layout(Protocol):
    """What a conversion asks of a source, whatever its layout."""

    source: Path
    #: Whether the negatives that it names are for training.
    gives_negatives: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the records depend on besides the files."""

    def files(self) -> list[Path]:
        """Every file that records come from."""

    def open_prompts(self) -> IO[bytes]:
        """An instruction file, open to read; see :func:`~lightning_mmembed.data.layout.read_instructions`."""

    def query_files(self, split: str) -> list[Path]:
        """Files of the queries of a split."""

    def upsampled_files(self) -> list[Path]:
        """Files in which a training query stands as often as it is to be trained on."""

    def pool_files(self) -> Iterator[tuple[str, Path]]:
        """Pairs of (pool name, file)."""

    def candidates(self, path: Path) -> Iterator[CandidateRecord | BadRecord | Noted]:
        """The records of a pool file."""

    def queries(self, path: Path) -> Iterator[QueryRecord | BadRecord | Noted]:
        """The records of a query file."""

    def qrels(self, split: str, dataset: str = "*") -> dict[str, dict[str, tuple[str, ...]]]:
        """Positives of each qid by task or dataset, where they stand apart from the queries."""


def read_records(path: Path, build: Callable[[int, Any], Any]) -> Iterator[Any]:
    """Read a file of JSON lines.

    Args:
        path: The file.
        build: From the number of a line, from 1, and its content to what is yielded; a ``ValueError``, ``KeyError`` or
            ``TypeError`` of it tells what is wrong.

    Yields:
        What was built, or a :class:`BadRecord`.

    Raises:
        UserInputError: If the file ends in the middle of a line.
    """
    # Bytes: lines end at \n alone, not at U+2028 or U+0085, and one that is not UTF-8 is one bad record.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield build(number, json.loads(line))
            except json.JSONDecodeError as error:
                if not line.endswith(b"\n"):
                    raise UserInputError(
                        f"{path} ends in the middle of line {number}: the file was cut short; fetch it again"
                    ) from None
                yield BadRecord(f"{path}:{number}", f"not JSON ({error.msg})")
            except UnicodeDecodeError as error:
                yield BadRecord(f"{path}:{number}", f"not UTF-8 ({error.reason})")
            except (ValueError, KeyError, TypeError) as error:
                reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
                yield BadRecord(f"{path}:{number}", reason)
