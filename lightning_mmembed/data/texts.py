"""What sources of text-to-text data have in common: one dataset, one task, one pool, one line of instructions."""

from __future__ import annotations

import hashlib
import io
import re
import sqlite3
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from lightning_mmembed.data.instructions import draw
from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.data.text_prompts import prompts_for
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS, Task, decode_id, encode_id

#: Ids of M-BEIR's own datasets are below it.
FIRST_DATASET_ID = 10
#: A dataset whose id is not given gets one of these by its name.
_DERIVED_IDS = range(100_000, 1_000_000)
#: Ids at which :func:`~lightning_mmembed.items.encode_id` ends.
_LAST_DATASET_ID = 2**63 // 10**10 - 1

_MBEIR_DATASETS = {Task.parse(name).dataset for name in MBEIR_TASKS}


class TextLayout:
    """A source of texts that are asked for with texts; a base class.

    Args:
        source: Where it lies.
        dataset: Its name; by default that of the folder or the file.
        dataset_id: First part of its ids; by default a number of six digits that the name alone decides.
        instruction: The prompts; by default those of :func:`~lightning_mmembed.data.text_prompts.prompts_for`.
        val_fraction: About this share of the training queries becomes the validation split.
        test_fraction: About this share of them becomes the test split.
        split_seed: Chooses them: a query goes by its text and this number alone, so that equal texts stay together.

    Raises:
        UserInputError: If a setting cannot be used.
    """

    gives_negatives = False

    def __init__(
        self,
        source: str | Path,
        dataset: str | None = None,
        dataset_id: int | None = None,
        instruction: str | Sequence[str] | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
    ) -> None:
        self.source = Path(source)
        self.dataset = _dataset_name(self.source, dataset)
        self.dataset_id = _dataset_id(self.dataset, dataset_id)
        self.task = Task(self.dataset, 1)
        given = (instruction,) if isinstance(instruction, str) else tuple(instruction or ())
        self.instructions = given or prompts_for(self.dataset)
        for prompt in self.instructions:
            if not prompt.strip() or re.search(r"[\t\r\n]", prompt):
                raise UserInputError(f"instruction={prompt!r} is empty or has a tab or a line break; write a sentence")
        for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= share < 1 or val_fraction + test_fraction >= 1:
                raise UserInputError(f"{name}={share!r} cannot be used: give 0 or more, and below 1 with the other one")
        self.fractions, self.split_seed = {"test": test_fraction, "val": val_fraction}, split_seed

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the records depend on besides the files."""
        split = [self.fractions, self.split_seed if any(self.fractions.values()) else 0]
        return (type(self).__name__, self.dataset, self.dataset_id, self.instructions, split)

    def open_prompts(self) -> IO[bytes]:
        """An instruction file with one line."""
        prompts = [f"prompt_{number}" for number in range(1, len(self.instructions) + 1)]
        lines = [["query_modality", "cand_modality", "dataset_name", "dataset_id", *prompts]]
        lines += [["text", "text", self.dataset, str(self.dataset_id), *self.instructions]]
        return io.BytesIO("".join("\t".join(line) + "\n" for line in lines).encode())

    def upsampled_files(self) -> list[Path]:
        """None."""
        return []

    def qrels(self, split: str, dataset: str = "*") -> dict[str, dict[str, tuple[str, ...]]]:
        """None: the queries come with them."""
        return {}

    def pools(self, splits: Sequence[str], path: Path) -> Iterator[tuple[str, Path]]:
        """One file as the pool of every split that has queries; a pool that nobody asks would only be in the way."""
        for split in splits:
            yield (TRAIN_POOL if split == "train" else f"{self.task.name}/{split}"), path

    def held_out(self, text: str) -> str:
        """The split of a training query."""
        place, end = draw(10**9, self.split_seed, "split", plain(text)), 0.0
        for split, share in self.fractions.items():
            end += share * 10**9
            if place < end:
                return split
        return "train"

    def id_of(self, number: int) -> str:
        """The ``did`` or ``qid`` of a number."""
        return decode_id(encode_id(f"{self.dataset_id}:{number}"))

    @cached_property
    def db(self) -> sqlite3.Connection:
        """What has been read, in a file without a name that SQLite removes by itself; memory does not grow with it."""
        db = sqlite3.connect("", isolation_level=None)
        db.execute("PRAGMA cache_size = -131072")  # KiB
        return db


def plain(text: str) -> str:
    r"""A text but for capitals and white space.

    Example:
        >>> plain("A  red\nbus ")
        'a red bus'
    """
    return " ".join(text.split()).lower()


def joined(title: object, text: object) -> str:
    """Title and text of a document with a space between, as BEIR's tools join them.

    Example:
        >>> joined("Buses", "Some are red."), joined(None, " Some are red.")
        ('Buses Some are red.', 'Some are red.')

    Raises:
        UserInputError: If one of them is neither a text nor absent.
    """
    for name, value in (("title", title), ("text", text)):
        if value is not None and not isinstance(value, str):
            raise UserInputError(f"{name}={value!r} is no text; write a string")
    whole = f"{title or ''} {text or ''}".strip()
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise UserInputError(
            f"text={whole[:80]!a} holds half a character (a lone surrogate); write all of it"
        ) from None
    return whole


def _dataset_name(source: Path, given: str | None) -> str:
    name = (source.resolve().name if source.is_dir() else source.stem).lower() if given is None else str(given)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name) or re.search(r"_task\d+$", name):
        raise UserInputError(
            f"dataset={name!r} cannot name a task; give dataset= in small letters, such as dataset=scifact"
        )
    if name in _MBEIR_DATASETS:
        raise UserInputError(f"dataset={name!r} is the name of a dataset of M-BEIR; give another with dataset=")
    return name


def _dataset_id(name: str, given: int | None) -> int:
    if given is None:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return _DERIVED_IDS[int.from_bytes(digest, "big") % len(_DERIVED_IDS)]
    if type(given) is not int or not FIRST_DATASET_ID <= given <= _LAST_DATASET_ID:
        raise UserInputError(
            f"dataset_id={given!r} cannot be used: M-BEIR has 0 to {FIRST_DATASET_ID - 1}; give a whole number from "
            f"{FIRST_DATASET_ID} to {_LAST_DATASET_ID}, another for every dataset"
        )
    return given
